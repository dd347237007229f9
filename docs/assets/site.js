// For keyboards and screen readers: the search has a name, and what scrolls can be scrolled with keys.
function complete() {
  document.querySelector(".md-search[role=dialog]")?.setAttribute("aria-label", "Search");
  for (const each of document.querySelectorAll(".md-typeset__scrollwrap")) each.tabIndex = 0;
}
new MutationObserver(complete).observe(document.documentElement, { childList: true, subtree: true });
complete();
