const dark = matchMedia("(prefers-color-scheme: dark)");
const PRINTED_WIDTH = 660;
let printing = false;
let opened = [];
function draw([name, figure]) {
  const template = dark.matches && !printing ? themes.dark : themes.light;
  const layout = {...figure.layout, template, dragmode: false, autosize: !printing};
  if (printing) layout.width = PRINTED_WIDTH;
  Plotly.react(`plot-${name}`, figure.data, layout, {displayModeBar: false, responsive: true});
}
// One figure a frame, so that the page can be read and used meanwhile.
async function drawInTurn() {
  for (const entry of Object.entries(figures)) {
    await new Promise(requestAnimationFrame);
    draw(entry);
  }
}
function drawPrinted(begins) {
  printing = begins;
  // What was open before is open afterwards.
  const all = [...document.querySelectorAll("details")];
  if (begins) opened = all.filter((details) => details.open);
  for (const details of all) details.open = begins || opened.includes(details);
  Object.entries(figures).forEach(draw);
}
addEventListener("load", drawInTurn);
dark.addEventListener("change", drawInTurn);
addEventListener("beforeprint", () => drawPrinted(true));
addEventListener("afterprint", () => drawPrinted(false));
