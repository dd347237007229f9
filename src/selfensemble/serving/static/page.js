// Choose an image, watch the draws vote, attack it. Plain DOM, no library.
const $ = (id) => document.getElementById(id);
let image = null; // base64 of the file
let key = "";
let keyed = false; // the noise is a function of the image: it has one answer, of a fixed number of draws
let turn = 0; // what an older vote still brings is thrown away

function say(problem) {
  $("problem").textContent = problem;
  $("problem").hidden = !problem;
}

// What is wrong with a number in a field, in words beside it; the number if nothing is.
function number(id, wanted, isRight) {
  const field = $(id);
  const value = field.value.trim() === "" ? NaN : Number(field.value);
  const right = Number.isFinite(value) && isRight(value);
  $(`${id}-problem`).textContent = right ? "" : wanted;
  $(`${id}-problem`).hidden = right;
  field.setAttribute("aria-invalid", String(!right));
  return right ? value : null;
}

function drawsWanted() {
  const most = Number($("draws").max);
  return number("draws", `Draws are a whole number from 1 to ${most}.`,
    (value) => Number.isInteger(value) && value >= 1 && value <= most);
}

function distanceWanted() {
  const most = Number($("eps").max);
  return number("eps", `The distance is a number above 0, at most ${most}: no image is farther from this one.`,
    (value) => value > 0 && value <= most);
}

async function ask(path, body) {
  const headers = { "Content-Type": "application/json" };
  if (key) headers["X-API-Key"] = key;
  const answer = await fetch(path, body ? { method: "POST", headers, body: JSON.stringify(body) } : { headers });
  if (answer.status === 401) {
    $("access").hidden = false;
    $("key").focus();
    throw new Error(key ? "This is not the key of this server: type it again." : "This server requires a key: type it below.");
  }
  if (!answer.ok) {
    const told = await answer.json().catch(() => ({ error: `the server answers ${answer.status}` }));
    throw new Error(told.error);
  }
  return answer;
}

const percent = (share) => `${(100 * share).toFixed(1)}\u00a0%`;
const named = (answer) => `${answer.label}, ${percent(answer.probability)}`;

async function begin() {
  try {
    const model = await (await ask("v1/model")).json();
    $("access").hidden = true;
    say("");
    const [channels, height, width] = model.shape;
    const colours = channels === 1 ? "grey" : "colour";
    $("about").textContent = `It takes ${colours} images of ${width} x ${height} pixels (others are resized) and ` +
      `knows ${model.classes.length} classes.`;
    $("model").textContent = figures(model);
    $("model").hidden = false;
    $("draws").max = model.limits.max_draws;
    $("eps").max = Math.floor(100 * Math.sqrt(channels * height * width)) / 100;
    keyed = model.keyed;
    if (keyed) {
      $("draws").value = model.draws;
      $("draws").disabled = true;
      $("draws-note").textContent = "for everybody: the noise of an image is a function of it and of a secret";
    }
    $("attack").dataset.allowed = model.page.attack ? "yes" : "";
    $("samples").replaceChildren(...model.page.samples.map(sampleButton));
  } catch (error) {
    say(error.message);
  }
}

function figures(model) {
  const said = [model.name || "A network without a name"];
  const test = model.metrics.test;
  if (test && typeof test.accuracy === "number") {
    said.push(`without attack ${percent(test.accuracy)} of ${test.images} test images right ` +
      `(95\u00a0% interval ${percent(test.low)} to ${percent(test.high)})`);
  } else said.push("accuracy not stored with it");
  const levels = model.noise.map((level) => Number(level.toFixed(3)));
  const inner = [...new Set(levels.slice(1))];
  if (levels.length) {
    said.push(`noise ${levels[0]} on the image` +
      (inner.length ? `, ${inner.length > 1 ? `${Math.min(...inner)} to ${Math.max(...inner)}` : inner[0]} inside` : ""));
  }
  said.push("this page does not measure its accuracy under attack");
  return `${said.join("; ")}.`;
}

function sampleButton(sample) {
  const button = document.createElement("button");
  const picture = document.createElement("img");
  button.type = "button";
  picture.src = `data:image/png;base64,${sample.image}`;
  picture.alt = sample.caption;
  button.append(picture);
  button.addEventListener("click", () => choose(sample.image, `data:image/png;base64,${sample.image}`, sample.caption));
  return button;
}

const KINDS = ["image/png", "image/jpeg", "image/webp", "image/bmp", "image/gif"];

async function take(files) {
  const [file] = files;
  if (!file) return;
  if (!KINDS.includes(file.type)) {
    say(`${file.name} is not an image that this page accepts: choose a PNG, JPEG, WebP, BMP or GIF file.`);
    return;
  }
  const url = await new Promise((resolve, reject) => {
    const reader = new FileReader();
    reader.onload = () => resolve(reader.result);
    reader.onerror = () => reject(reader.error);
    reader.readAsDataURL(file);
  });
  choose(url.slice(url.indexOf(",") + 1), url, file.name, files.length);
}

function choose(base64, url, name, files = 1) {
  image = base64;
  $("preview").src = url;
  $("caption").textContent = name;
  $("shown").hidden = $("vote").hidden = false;
  $("attack").hidden = !$("attack").dataset.allowed;
  $("result").hidden = true;
  $("attacking").textContent = "";
  vote();
  if (files > 1) $("caption").textContent += ` (the first of ${files} files: one image at a time)`;
}

async function vote() {
  const wanted = drawsWanted();
  if (wanted === null) return;
  const mine = ++turn;
  $("again").disabled = true;
  $("ensemble").textContent = $("plain").textContent = "–";
  $("count").textContent = $("told").textContent = "";
  $("votes").replaceChildren();
  say("");
  try {
    const answer = await ask("v1/votes", keyed ? { image } : { image, draws: wanted });
    const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
    let rest = "";
    for (;;) {
      const { value, done } = await reader.read();
      if (mine !== turn) { reader.cancel(); return; }
      if (done) break;
      const lines = (rest + value).split("\n");
      rest = lines.pop();
      for (const line of lines) show(JSON.parse(line), wanted);
    }
  } catch (error) {
    if (mine === turn) say(error.message);
  } finally {
    if (mine === turn) $("again").disabled = false;
  }
}

function show(state, wanted) {
  if (state.error) { say(state.error); return; }
  if (state.plain) {
    $("plain").textContent = named(state.plain);
    $("eps").max = Math.floor(100 * state.reach) / 100;
    return;
  }
  const last = state.draws === wanted;
  $("count").textContent = last ? `${wanted} draws have voted.` : `${state.draws} of ${wanted} draws have voted.`;
  // Screen readers are told once, at the end, rather than at every draw.
  const leader = state.classes.reduce((a, b) => (b.probability > a.probability ? b : a));
  if (last) $("told").textContent = `${wanted} draws have voted: ${named(leader)}.`;
  $("ensemble").textContent = named(leader);
  $("votes").replaceChildren(...state.classes.map((each) => {
    const row = document.createElement("tr");
    const head = cell("th", each.label);
    head.scope = "row";
    const bar = document.createElement("span");
    bar.className = "bar";
    bar.style.width = `${100 * each.votes / state.draws}%`;
    const wide = document.createElement("td");
    wide.append(bar);
    row.append(head, cell("td", String(each.votes), "number"), cell("td", percent(each.probability), "number"), wide);
    return row;
  }));
}

function cell(kind, text, name = "") {
  const made = document.createElement(kind);
  made.textContent = text;
  if (name) made.className = name;
  return made;
}

async function attack(event) {
  event.preventDefault();
  const form = new FormData($("attack-form"));
  const pgd = form.get("attack") === "pgd";
  const eps = distanceWanted();
  if (pgd && eps === null) return;
  $("run").disabled = true;
  $("attacking").textContent = "Attacking; this can take a minute.";
  $("result").hidden = true;
  say("");
  try {
    const found = await (await ask("v1/attack", {
      image, target: form.get("target"), attack: form.get("attack"), ...(pgd ? { eps } : {}),
    })).json();
    for (const name of ["before", "change", "after"]) $(name).src = `data:image/png;base64,${found[name]}`;
    const times = found.magnified > 1 ? `, ${found.magnified} times` : "";
    $("change-caption").textContent = `change${times}; L2 ${found.l2.toFixed(2)}`;
    const target = found.answers[found.target === "plain" ? 1 : 0];
    $("verdict").replaceChildren(...found.answers.map((each) => {
      const row = document.createElement("tr");
      const head = cell("th", each.who);
      head.scope = "row";
      const fooled = each.before.label !== each.after.label;
      const same = each === target ? "this attack found nothing" : "same answer; it was not attacked";
      const after = cell("td", `${named(each.after)} (${fooled ? "fooled" : same})`, fooled ? "fooled" : "");
      row.append(head, cell("td", named(each.before)), after);
      return row;
    }));
    const within = pgd ? `, within an L2 distance of ${eps}` : "";
    $("attacking").textContent = found.found
      ? `The attack found an image that fools its target, ${target.who}.`
      : `${found.gradients} gradients found no image that fools its target, ${target.who}${within}. ` +
        "That proves nothing about it: a longer or different attack may find one.";
    $("result").hidden = false;
  } catch (error) {
    $("attacking").textContent = "";
    say(error.message);
  } finally {
    $("run").disabled = false;
  }
}

$("file").addEventListener("change", (event) => take(event.target.files));
$("draws").addEventListener("input", drawsWanted);
$("eps").addEventListener("input", distanceWanted);
$("again").addEventListener("click", vote);
$("attack-form").addEventListener("submit", attack);
$("access").addEventListener("submit", (event) => {
  event.preventDefault();
  key = $("key").value;
  begin();
});
for (const kind of ["dragenter", "dragover"]) {
  document.addEventListener(kind, (event) => { event.preventDefault(); $("drop").classList.add("over"); });
}
for (const kind of ["dragleave", "drop"]) {
  document.addEventListener(kind, (event) => { event.preventDefault(); $("drop").classList.remove("over"); });
}
document.addEventListener("drop", (event) => {
  if (event.dataTransfer.files.length) take(event.dataTransfer.files);
  else say("This is not a file: drop an image file, or choose one.");
});
begin();
