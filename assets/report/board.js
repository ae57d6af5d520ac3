(() => {
  const {models, datasets, views, cells, seeds} = shown;
  const filters = document.getElementById("filters");
  const dialog = document.getElementById("behind");
  const asked = dialog.querySelector(".filters").elements;
  const page = pager(dialog, dialog.querySelector("ol"));
  const STRONGEST = 0.6;
  let behind;

  const minus = (text) => text.replace("-", "−");
  // No minus before nothing.
  const fixed = (value, digits) => minus((Math.round(value * 10 ** digits) / 10 ** digits + 0).toFixed(digits));
  const signed = (value) => (Math.round(100 * value) > 0 ? "+" : "") + fixed(100 * value, 0);
  const points = ([value, low, high]) => [signed(value), `${signed(low)} to ${signed(high)}`];
  const decimals = (digits) => ([value, low, high]) => [fixed(value, digits), `${fixed(low, digits)}–${fixed(high, digits)}`];

  function numberCell(ends, written) {
    if (ends === null) return element("td", "", "n/a");
    const [value, interval] = written(ends);
    const cell = element("td", "", value, element("small", "", interval));
    cell.dataset.value = ends[0];
    return cell;
  }

  function plainCell(value, text) {
    const cell = element("td", "", text);
    if (value !== null) cell.dataset.value = value;
    return cell;
  }

  function heading(scope, text, ...notes) {
    const made = element("th", "", text, ...notes.filter(Boolean).map((note) => element("small", "", note)));
    made.scope = scope;
    return made;
  }

  function rankedRow(row, blocks) {
    const notes = [row.derived && "ablation of another method", row.front && "on the front"];
    const ran = element("td", "choice", `${row.cells} of ${blocks}`);
    if (row.applied < row.studies) {
      ran.append(element("small", "", `applied in ${row.applied} of ${row.studies} studies`));
    }
    return element("tr", row.of !== null ? "control" : row.front ? "marked" : "",
      heading("row", row.method, ...notes), ran,
      plainCell(row.rank, row.rank === null ? "–" : String(row.rank)),
      numberCell(row.gain, points),
      plainCell(row.damage, row.damage === null ? "n/a" : signed(row.damage)),
      ...row.losses.map((loss) => numberCell(loss, points)),
      numberCell(row.kl, decimals(3)),
      numberCell(row.speed, decimals(2)));
  }

  function group(text) {
    const rest = element("td");
    rest.colSpan = 9;
    const label = heading("rowgroup", text);
    return element("tr", "group", label, rest);
  }

  function refusedRow([method, where, reason]) {
    const said = element("td", "reason", reason);
    said.colSpan = 9;
    return element("tr", "", heading("row", method, where), said);
  }

  function showRanking(view, {towards}) {
    const table = document.getElementById("ranked");
    for (const column of table.tHead.rows[0].cells) column.ariaSort = null;
    const controlled = (method) => view.controls.filter((control) => control.of === method);
    const rows = view.rows.flatMap((row) => [
      rankedRow(row, view.blocks), ...controlled(row.method).map((control) => rankedRow(control, view.blocks)),
    ]);
    table.tBodies[0].replaceChildren(group(`towards ${towards}`), ...rows);
    table.tBodies[1].replaceChildren(...(view.refused.length ? [group("did not run"), ...view.refused.map(refusedRow)] : []));
  }

  function showHeat(view, {towards, choice, model, data}) {
    const own = cells.filter((cell) => cell.view === `${towards}-${choice}` &&
      ["all", String(cell.model)].includes(model) && ["all", String(cell.data)].includes(data));
    const columns = new Map(own.map((cell) => [`${cell.model}-${cell.data}`, cell]));
    const most = Math.max(...own.map((cell) => Math.abs(cell.gain[0])), 0.01);
    const table = document.getElementById("heat");
    table.tHead.replaceChildren(element("tr", "", heading("col", "Method"), ...[...columns.values()].map((cell) =>
      heading("col", datasets[cell.data], models.length > 1 && models[cell.model]))));
    table.tBodies[0].replaceChildren(...view.rows.map(({method}) => element("tr", "", heading("row", method),
      ...[...columns.keys()].map((key) => {
        const cell = own.find((one) => one.method === method && `${one.model}-${one.data}` === key);
        return element("td", "", cell ? cellButton(cell, most, towards) : element("span", "", "not run"));
      }))));
  }

  function cellButton(cell, most, towards) {
    const [value, interval] = points(cell.gain);
    const idle = cell.sources.filter(([, condition]) => condition === null).length;
    const lacking = cell.seeds - cell.sources.length;
    const notes = [
      idle === cell.sources.length ? "nothing fits" : interval,
      idle && idle < cell.sources.length && `nothing fits: ${idle} of ${cell.sources.length}`,
      lacking && `${lacking} of ${cell.seeds} seeds not run`,
    ].filter(Boolean);
    const button = element("button", "", value, ...notes.map((note) => element("small", "", note)));
    button.type = "button";
    button.style.setProperty("--tint", `var(--${cell.gain[0] < 0 ? "other" : towards})`);
    button.style.setProperty("--share", (STRONGEST * Math.abs(cell.gain[0]) / most).toFixed(3));
    button.ariaLabel = `${cell.method} on ${datasets[cell.data]}, ${models[cell.model]}: gain ${value} points, ${notes.join(", ")}; show its prompts`;
    button.addEventListener("click", () => open(cell, towards));
    return button;
  }

  function show() {
    const chosen = Object.fromEntries(new FormData(filters));
    const view = views[`${chosen.model}-${chosen.data}-${chosen.towards}-${chosen.choice}`];
    document.getElementById("nothing").hidden = view !== undefined;
    document.getElementById("shown").hidden = view === undefined;
    if (view === undefined) return;
    showRanking(view, chosen);
    showHeat(view, chosen);
    document.getElementById("said").textContent = view.said;
    document.getElementById("figure-ranks").hidden = view.figures.ranks === undefined;
    delete figures.ranks;
    Object.assign(figures, view.figures);
    for (const [name, figure] of Object.entries(figures)) {
      document.getElementById(`plot-${name}`).style.minHeight = `${figure.layout.height}px`;
    }
    drawInTurn();
  }

  // The answers of a study, which its file sets when it is loaded.
  function answersOf(study) {
    return new Promise((resolve, reject) => {
      if (globalThis.answers?.[study]) return resolve(globalThis.answers[study]);
      const script = element("script");
      script.src = `answers-${study}.js`;
      script.onload = () => resolve(globalThis.answers[study]);
      script.onerror = () => { script.remove(); reject(new Error(`answers-${study}.js is not beside this page; keep them in one folder.`)); };
      document.head.append(script);
    });
  }

  function open(cell, towards) {
    behind = {cell, towards};
    document.getElementById("behind-title").textContent =
      `${cell.method} towards ${towards} · ${models[cell.model]} · ${datasets[cell.data]}`;
    asked.source.replaceChildren(...cell.sources.map(([study], number) => new Option(`seed ${seeds[study]}`, number)));
    asked.kind.replaceChildren();
    asked.which.value = "changed";
    dialog.showModal();
    showPrompts();
  }

  async function showPrompts() {
    const {cell, towards} = behind;
    const status = dialog.querySelector(".found");
    const [study, name] = cell.sources[asked.source.value];
    page([]);
    status.textContent = "Loading the answers …";
    let answers;
    try {
      answers = await answersOf(study);
    } catch (error) {
      status.textContent = error.message;
      return;
    }
    // Another cell, or seed, may have been asked for meanwhile.
    if (behind.cell !== cell || cell.sources[asked.source.value][0] !== study) return;
    const {names, prompts, conditions} = answers;
    const kept = asked.kind.value || "conflict";
    asked.kind.replaceChildren(...names.kind.map((kind) => new Option(kind, kind, false, kind === kept)));
    const after = conditions.find((condition) => condition.name === name) ?? conditions[0];
    const kind = names.kind.indexOf(asked.kind.value);
    // Without a conflict the memory answer is the right one.
    const wanted = asked.kind.value === "conflict" ? {memory: "m", context: "c"}[towards] : "mb";
    const has = (condition, i) => wanted.includes(condition.usage[i]);
    const all = [...prompts.kind.keys()].filter((i) => prompts.kind[i] === kind);
    const sorts = {
      all,
      changed: all.filter((i) => conditions[0].usage[i] !== after.usage[i]),
      gained: all.filter((i) => !has(conditions[0], i) && has(after, i)),
      lost: all.filter((i) => has(conditions[0], i) && !has(after, i)),
    };
    status.textContent = name === null
      ? "Nothing of this method fits the budget here, so that it is not applied and no answer changes."
      : `${name}: of ${all.length} prompts ${sorts.changed.length} changed their usage; the wanted answer is gained in ${sorts.gained.length} and lost in ${sorts.lost.length}.`;
    page(sorts[asked.which.value].map((i) => () => promptRow(answers, after, i)));
  }

  filters.addEventListener("submit", (event) => event.preventDefault());
  filters.addEventListener("input", show);
  dialog.querySelector(".filters").addEventListener("input", showPrompts);
  dialog.addEventListener("click", (event) => { if (event.target === dialog) dialog.close(); });
  show();
})();
