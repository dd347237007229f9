// Choose an image, watch the draws vote, attack it. Plain DOM, no library.
const $ = (id) => document.getElementById(id);
let image = null; // base64 of the file
let key = "";
let turn = 0; // what an older vote still brings is thrown away

function say(problem) {
  $("problem").textContent = problem;
  $("problem").hidden = !problem;
}

async function ask(path, body) {
  const headers = { "Content-Type": "application/json" };
  if (key) headers["X-API-Key"] = key;
  const answer = await fetch(path, body ? { method: "POST", headers, body: JSON.stringify(body) } : { headers });
  if (answer.status === 401) $("access").hidden = false;
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
    $("about").textContent = `This one takes ${colours} images of ${width} x ${height} pixels and knows ` +
      `${model.classes.length} classes; others are resized.`;
    $("draws").max = model.limits.max_draws;
    $("attack").dataset.allowed = model.page.attack ? "yes" : "";
    $("samples").replaceChildren(...model.page.samples.map(sampleButton));
  } catch (error) {
    say(error.message);
  }
}

function sampleButton(sample) {
  const button = document.createElement("button");
  const picture = document.createElement("img");
  button.type = "button";
  picture.src = `data:image/png;base64,${sample.image}`;
  picture.alt = `Sample: ${sample.name}`;
  button.append(picture);
  button.addEventListener("click", () => choose(sample.image, `data:image/png;base64,${sample.image}`, sample.name));
  return button;
}

async function take(file) {
  if (!file) return;
  const url = await new Promise((resolve, reject) => {
    const reader = new FileReader();
    reader.onload = () => resolve(reader.result);
    reader.onerror = () => reject(reader.error);
    reader.readAsDataURL(file);
  });
  choose(url.slice(url.indexOf(",") + 1), url, file.name);
}

function choose(base64, url, name) {
  image = base64;
  $("preview").src = url;
  $("caption").textContent = name;
  $("shown").hidden = $("vote").hidden = false;
  $("attack").hidden = !$("attack").dataset.allowed;
  $("result").hidden = true;
  $("attacking").textContent = "";
  vote();
}

async function vote() {
  const mine = ++turn;
  const wanted = Math.max(1, Number($("draws").value) || 1);
  $("again").disabled = true;
  $("ensemble").textContent = $("plain").textContent = "–";
  $("count").textContent = $("told").textContent = "";
  $("votes").replaceChildren();
  say("");
  try {
    const answer = await ask("v1/votes", { image, draws: wanted });
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
  if (state.plain) { $("plain").textContent = named(state.plain); return; }
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
  $("run").disabled = true;
  $("attacking").textContent = "Attacking; this can take a minute.";
  $("result").hidden = true;
  say("");
  try {
    const found = await (await ask("v1/attack", {
      image, target: form.get("target"), attack: form.get("attack"), eps: Number(form.get("eps")),
    })).json();
    for (const name of ["before", "change", "after"]) $(name).src = `data:image/png;base64,${found[name]}`;
    const times = found.magnified > 1 ? `, ${found.magnified} times` : "";
    $("change-caption").textContent = `change${times}; L2 ${found.l2.toFixed(2)}`;
    $("verdict").replaceChildren(...found.answers.map((each) => {
      const row = document.createElement("tr");
      const head = cell("th", each.who);
      head.scope = "row";
      const fooled = each.before.label !== each.after.label;
      const after = cell("td", `${named(each.after)} (${fooled ? "fooled" : "same answer"})`, fooled ? "fooled" : "");
      row.append(head, cell("td", named(each.before)), after);
      return row;
    }));
    const target = found.answers[form.get("target") === "plain" ? 1 : 0];
    $("attacking").textContent = target.before.label !== target.after.label
      ? "The attack found an image that fools its target."
      : `${found.gradients} gradients found no image that fools its target. Another attack may find one.`;
    $("result").hidden = false;
  } catch (error) {
    $("attacking").textContent = "";
    say(error.message);
  } finally {
    $("run").disabled = false;
  }
}

$("file").addEventListener("change", (event) => take(event.target.files[0]));
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
document.addEventListener("drop", (event) => take(event.dataTransfer.files[0]));
begin();
