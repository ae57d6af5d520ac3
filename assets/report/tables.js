// A click on a column's name sorts each part of its table by it, then the other way round; controls stay below theirs.
for (const button of document.querySelectorAll(".conditions thead button")) {
  button.addEventListener("click", () => {
    const heading = button.parentElement;
    const isText = heading.cellIndex < 2;
    const rising = heading.ariaSort ? heading.ariaSort === "descending" : isText;
    for (const other of heading.parentElement.cells) other.ariaSort = null;
    heading.ariaSort = rising ? "ascending" : "descending";
    const worth = ([row]) => row.cells[heading.cellIndex].dataset.value;
    const text = ([row]) => row.cells[heading.cellIndex].textContent.trim();
    const compare = (a, b) =>
      (!isText && (worth(a) === undefined) - (worth(b) === undefined)) ||
      (rising ? 1 : -1) * (isText ? text(a).localeCompare(text(b)) : worth(a) - worth(b) || 0);
    for (const body of heading.closest("table").querySelectorAll("tbody:not(.fixed)")) {
      const families = [];
      for (const row of [...body.rows].slice(1)) row.className === "control" ? families.at(-1).push(row) : families.push([row]);
      body.append(...families.sort(compare).flat());
    }
  });
}
