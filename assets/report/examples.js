(() => {
  const runs = JSON.parse(document.getElementById("answers").textContent);
  const section = document.getElementById("browser");
  const form = section.querySelector("form");
  const fields = form.elements;
  const page = pager(section, section.querySelector("ol"));
  let found = [];

  function fill(select, names, any, chosen) {
    const kept = select.value;
    const options = names.map((name) => new Option(name, name, name === chosen));
    if (any) options.unshift(new Option("any", ""));
    select.replaceChildren(...options);
    const wanted = names.includes(kept) ? kept : chosen;
    if (wanted !== undefined) select.value = wanted;
  }

  const run = () => runs.length > 1 ? runs[fields.run.selectedIndex] : runs[0];
  const after = () => run().conditions[fields.after.selectedIndex];
  const letter = (usage) => Object.keys(USAGES).find((key) => USAGES[key] === usage);

  function chooseRun() {
    const {names, conditions, shown} = run();
    fill(fields.after, conditions.map((condition) => condition.name), false, shown);
    fill(fields.kind, names.kind, true, names.kind.find((kind) => kind === "conflict"));
    fill(fields.relation, names.relation, true);
    fill(fields.template, names.template, true);
  }

  function filter() {
    const {names, prompts, conditions, held_out} = run();
    const answered = [conditions[0], after()];
    const usages = [fields.before_usage, fields.after_usage].map((field) => letter(field.value));
    const wanted = ["kind", "relation", "template"].map((name) => [prompts[name], names[name].indexOf(fields[name].value)]);
    const unseen = names.template.indexOf(held_out);
    const text = fields.text.value.trim().toLowerCase();
    const fits = (i) =>
      wanted.every(([column, number]) => number < 0 || column[i] === number) &&
      (!fields.held_out.value || (prompts.template[i] === unseen) === (fields.held_out.value === "yes")) &&
      answered.every((condition, which) => !usages[which] || condition.usage[i] === usages[which]) &&
      (!text || [prompts.prompt[i], prompts.subject[i], ...answered.map((condition) => condition.answer[i])]
        .join("\n").toLowerCase().includes(text));
    found = [...prompts.kind.keys()].filter(fits);
    show();
  }

  function counted(condition) {
    const counts = Object.keys(USAGES).map((key) => [USAGES[key], found.filter((i) => condition.usage[i] === key).length]);
    return counts.filter(([, count]) => count)
      .map(([usage, count]) => `${usage} ${count} (${(100 * count / found.length).toFixed(1)}%)`).join(", ");
  }

  function show() {
    const {conditions, prompts} = run();
    section.querySelector(".found").textContent = `${found.length} of ${prompts.kind.length} prompts. ` +
      (found.length ? `Before: ${counted(conditions[0])}. After (${after().name}): ${counted(after())}.` : "Nothing fits all filters.");
    page(found.map((i) => () => promptRow(run(), after(), i)));
  }

  form.addEventListener("submit", (event) => event.preventDefault());
  form.addEventListener("input", (event) => { if (event.target.name === "run") chooseRun(); filter(); });
  // The fields are reset after the event.
  form.addEventListener("reset", () => setTimeout(() => { chooseRun(); filter(); }));
  if (runs.length > 1) fill(fields.run, runs.map(({name}) => name), false);
  for (const field of [fields.before_usage, fields.after_usage]) fill(field, Object.values(USAGES), true);
  chooseRun();
  filter();
})();
