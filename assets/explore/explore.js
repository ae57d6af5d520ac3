// Figures are drawn on the server, which has to be told whether the browser is dark, now and whenever that changes.
const dark = window.matchMedia("(prefers-color-scheme: dark)");
const scheme = () => (dark.matches ? "dark" : "light");
dark.addEventListener("change", () => window.dash_clientside.set_props("scheme", { data: scheme() }));
window.dash_clientside = Object.assign({}, window.dash_clientside, { explore: { scheme } });
// dash names neither a slider's handle nor its number; both get the name of the group that they are in.
new MutationObserver(() => {
  for (const part of document.querySelectorAll("[role=group] :is([role=slider], [type=number]):not([aria-labelledby])")) {
    part.setAttribute("aria-labelledby", part.closest("[role=group]").getAttribute("aria-labelledby"));
  }
}).observe(document.documentElement, { childList: true, subtree: true });
