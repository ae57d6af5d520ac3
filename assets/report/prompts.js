const USAGES = {m: "memory", c: "context", b: "both", o: "other", e: "empty"};
const SHOWN = 20;

// All text is set as text, never as HTML: it comes from models and data.
function element(tag, name, ...children) {
  const made = document.createElement(tag);
  if (name) made.className = name;
  made.append(...children);
  return made;
}

function answered(condition, i) {
  const usage = USAGES[condition.usage[i]];
  const difference = condition.logit[i];
  const written = difference === null ? "" : `logit difference ${difference < 0 ? "−" : "+"}${Math.abs(difference).toFixed(2)}`;
  return [element("span", `usage ${usage}`, usage), " ", element("q", "", condition.answer[i]), " ", element("small", "", written)];
}

// A prompt of a study, with what was answered before and after.
function promptRow({names, prompts, conditions, held_out}, after, i) {
  const template = names.template[prompts.template[i]];
  const about = [
    prompts.subject[i], names.relation[prompts.relation[i]], names.kind[prompts.kind[i]],
    template + (template === held_out ? " (held out)" : ""),
  ];
  const facts = [
    ["Memory says", [prompts.memory[i]]],
    ["Context says", [prompts.context[i] || "nothing about it"]],
    ["Before", answered(conditions[0], i)],
    ["After", answered(after, i)],
  ];
  return element("li", "",
    element("div", "", element("p", "how", about.join(" · ")), element("p", "prompt", prompts.prompt[i])),
    element("dl", "", ...facts.map(([term, words]) => element("div", "", element("dt", "", term), element("dd", "", ...words)))));
}

// A list of prompts, some at a time, with buttons that turn its pages.
function pager(section, list) {
  const [previous, next] = section.querySelectorAll(".pager button");
  let rows = [];
  let first = 0;
  function turn(by) {
    first += by;
    const last = Math.min(first + SHOWN, rows.length);
    section.querySelector(".pager span").textContent = rows.length ? `${first + 1} to ${last} of ${rows.length}` : "none";
    previous.disabled = first === 0;
    next.disabled = last === rows.length;
    list.start = first + 1;
    list.replaceChildren(...rows.slice(first, last).map((made) => made()));
  }
  previous.addEventListener("click", () => turn(-SHOWN));
  next.addEventListener("click", () => turn(SHOWN));
  return (made) => { rows = made; first = 0; turn(0); };
}
