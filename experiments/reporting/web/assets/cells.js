// What a cell opens.

const dialog = document.getElementById("detail");

let asked = null; // the cell that was last asked for

async function openCell(key) {
  const packed = document.getElementById(key);
  if (!packed) return;
  asked = key;
  const cell = JSON.parse(await unpack(key));
  if (asked !== key) return; // another one has been asked for since
  dialog.replaceChildren(
    element("button", { type: "button", class: "close", onclick: () => dialog.close() }, "Close"),
    element("h2", { id: "detail-title", tabindex: "-1" }, cell.name),
    ...resultsOf(cell),
    ...seedsOf(cell),
    ...curvesOf(cell),
    ...tuningOf(cell),
    ...commandsOf(cell),
  );
  if (!dialog.open) dialog.showModal();
  dialog.scrollTop = 0;
  dialog.querySelector("h2").focus();
  history.replaceState(null, "", `#${key}`);
  for (const figure of dialog.querySelectorAll("figure")) await figure.draw();
}

/** A number with digits after the point; negative: that many significant ones. */
function format(value, digits) {
  if (value === null) return "";
  return digits >= 0 ? value.toFixed(digits) : value.toExponential(-digits - 1);
}

function signed(value, digits) {
  return `${value < 0 ? "" : "+"}${format(value, digits)}`;
}

/** A hyperparameter, as ticks and titles show it. */
function plain(value) {
  return value !== 0 && Math.abs(value) < 0.001 ? value.toExponential() : String(value);
}

function resultsOf(cell) {
  const budget =
    cell.epochs === null
      ? ""
      : `${cell.epochs} ${cell.paper_epochs && cell.paper_epochs !== cell.epochs ? `of the paper's ${cell.paper_epochs} ` : ""}epochs`;
  const lines = cell.failed
    ? ["A run diverged."]
    : cell.measures
        .filter((m) => m.n)
        .map((m) => {
          const interval =
            m.low === null
              ? ""
              : `, 95 % interval ${format(m.low, m.digits)} to ${format(m.high, m.digits)}` +
                `, standard error ${format(m.error, m.digits)}`;
          return `${m.title}: ${format(m.mean, m.digits)}${interval}, n=${m.n}`;
        });
  if (!cell.seeds.length) lines.push("No final runs yet.");
  if (cell.paper) {
    const difference =
      cell.difference === null ? "" : `, a difference of ${signed(cell.difference, cell.measures[0].digits)}`;
    lines.push(`The paper: ${cell.paper}${difference}`);
  }
  lines.push(...cell.gains);
  return [
    element("p", {}, budget),
    element(
      "ul",
      {},
      lines.map((line) => element("li", {}, line)),
    ),
  ];
}

function seedsOf(cell) {
  if (!cell.seeds.length) return [];
  const heads = ["seed", ...cell.measures.map((m) => m.title), "code", "record"];
  const rows = cell.seeds.map((run) => [
    String(run.seed),
    ...run.values.map((value, i) => (value === null ? run.status : format(value, cell.measures[i].digits))),
    run.code,
    element("a", { href: run.file }, run.record),
  ]);
  return [element("h3", {}, "Seeds"), scrolling("Seeds", element("table", {}, ...tableOf(heads, rows)))];
}

function scrolling(label, child) {
  return element("div", { class: "scroll", tabindex: "0", role: "region", "aria-label": label }, child);
}

/** A figure that is drawn once it is in the page. */
function figureOf(cell, title, draw) {
  const figure = element("figure", {
    class: "chart waiting",
    "data-title": `${cell.name}: ${title}`,
    "data-name": title.replaceAll(" ", "-"),
  });
  figure.draw = () => draw(figure);
  return figure;
}

function curvesOf(cell) {
  if (!cell.curves || !cell.curves.rows[0]?.length) return [];
  const seeds = cell.seeds.length > 1 ? "Mean over seeds and their range" : "One seed";
  const marked = cell.curves.rows[0].some(({ lines }) => lines.some(({ mark }) => mark !== null));
  const note = `${seeds}${marked ? "; the dot is the last point before LAWN fixes the norms" : ""}.`;
  return [
    element("h3", {}, "Curves"),
    element("p", { class: "soft" }, note),
    figureOf(cell, "curves", (figure) => drawChart(figure, cell.curves)),
  ];
}

function tuningOf(cell) {
  if (!cell.rungs.length) return [];
  const chosen = cell.setting
    ? element(
        "ul",
        {},
        element("li", {}, "Chosen: ", element("b", {}, cell.setting)),
        cell.tuning.map(([head, text]) => element("li", {}, `${head[0].toUpperCase()}${head.slice(1)}: ${text}`)),
      )
    : element("p", {}, "Nothing is chosen yet.");
  const rungs = cell.rungs.flatMap((rung) => [
    element("h4", {}, rung.title[0].toUpperCase() + rung.title.slice(1)),
    rung.seeds
      ? seedTable(rung)
      : figureOf(cell, `tuning ${rung.title.split(",")[1].trim()}`, (figure) => drawHeatMap(figure, rung)),
  ]);
  const framed = cell.setting ? " The chosen one has a frame, also in the grid of fewer epochs if it is there." : "";
  const note =
    `The headline metric on the ${cell.split} split of each setting that was tried; × has diverged; the worst ` +
    `quarter has one color.${framed}`;
  return [element("h3", {}, "Tuning"), chosen, element("p", { class: "soft" }, note), ...rungs];
}

function seedTable(rung) {
  const heads = [...rung.axes, "seed", "score", ""];
  const rows = rung.runs.map((run) => [
    ...run.values.map(plain),
    String(run.seed),
    format(run.score, 2) || "diverged",
    run.chosen ? "chosen" : "",
  ]);
  return scrolling("Other seeds", element("table", {}, ...tableOf(heads, rows)));
}

/** The first hyperparameter to the right, the second upwards, a subplot for each value of the others. */
async function drawHeatMap(figure, rung) {
  await library();
  const [across, up, ...others] = rung.axes;
  const scores = rung.runs
    .map((run) => run.score)
    .filter((score) => score !== null)
    .sort((a, b) => a - b);
  const domain = [scores[Math.floor(scores.length / 4)] ?? 0, scores.at(-1) ?? 1]; // the worst quarter is dark alike
  const compare = (a, b) =>
    typeof a === "number" && typeof b === "number" ? a - b : String(a).localeCompare(String(b));
  const values = (axis) => [...new Set(rung.runs.map((run) => run.values[axis]))].sort(compare);
  const named = (run) => others.map((axis, i) => `${axis} ${plain(run.values[i + 2])}`).join(", ");
  const inOrder = [...rung.runs].sort((a, b) =>
    a.values.slice(2).reduce((sign, value, i) => sign || compare(value, b.values[i + 2]), 0),
  );
  const facets = new Map(inOrder.map((run) => [named(run), []]));
  for (const run of inOrder) facets.get(named(run)).push(run);
  const ticks = { tickFormat: plain, labelArrow: "none" };
  const height = up ? 60 + 28 * values(1).length : 90;
  const ink = (run) => ((run.score - domain[0]) / (domain[1] - domain[0] || 1) > 0.6 ? "#111" : "#fff");
  const subplots = [...facets].map(([name, runs]) => {
    const at = { x: (run) => run.values[0], y: up ? (run) => run.values[1] : () => "" };
    const svg = Plot.plot({
      width: WIDTH,
      height,
      marginLeft: 52,
      marginRight: 8,
      marginBottom: 36,
      marginTop: 22,
      padding: 0.05,
      style: { background: "transparent", color: "currentColor", fontSize: "11px" },
      ariaLabel: `${rung.title}${others.length ? `, ${name}` : ""}: score over ${across}${up ? ` and ${up}` : ""}`,
      x: { type: "band", domain: values(0), label: across, labelAnchor: "center", ...ticks },
      y: { type: "band", label: up ?? null, ...(up ? { domain: values(1).reverse(), ...ticks } : { domain: [""] }) },
      color: { type: "linear", scheme: "viridis", domain, clamp: true },
      marks: [
        Plot.cell(runs, {
          ...at,
          fill: (run) => run.score ?? domain[0],
          title: (run) =>
            `${rung.axes.map((axis, i) => `${axis} ${plain(run.values[i])}`).join(", ")}: ${format(run.score, 2) || "diverged"}`,
        }),
        Plot.text(runs, {
          ...at,
          text: (run) => (run.score === null ? "×" : run.score.toFixed(1)),
          fill: ink,
          fontSize: 10,
          pointerEvents: "none",
        }),
        Plot.cell(
          runs.filter((run) => run.chosen),
          { ...at, stroke: "#D55E00", strokeWidth: 3, fill: "none", inset: -1 },
        ),
      ],
    });
    asImage(svg);
    return element("div", {}, others.length ? element("h4", {}, name) : "", svg);
  });
  figure.append(element("div", { class: "plots" }, subplots), keepers(figure));
  figure.classList.remove("waiting");
}

function commandsOf(cell) {
  const command = (text) => [
    element("pre", {}, text),
    element("button", { type: "button", onclick: (event) => copy(text, event.currentTarget) }, "Copy the command"),
  ];
  const list = [
    ["Hardware", cell.machine.hardware],
    ["Code", cell.machine.code],
    ["Packages", cell.machine.packages],
  ]
    .filter(([, values]) => values.length)
    .flatMap(([name, values]) => [element("dt", {}, name), element("dd", {}, values.join(", "))]);
  return [
    element("h3", {}, "Run it again"),
    ...(cell.command
      ? [
          element("p", {}, `The run with seed ${cell.seeds[0].seed}; the others differ in the seed:`),
          ...command(cell.command),
        ]
      : []),
    element("p", {}, "All runs of the cell, with the tuning, as far as they are missing:"),
    ...command(cell.fill),
    element("h3", {}, "Versions and hardware"),
    element("dl", {}, list),
  ];
}

document.addEventListener("click", (event) => {
  const button = event.target.closest("button[data-cell]");
  if (button) openCell(button.dataset.cell);
});
dialog.addEventListener("click", (event) => {
  // beside the dialog
  if (event.target === dialog) {
    const box = dialog.getBoundingClientRect();
    if (event.clientX < box.left || event.clientX > box.right || event.clientY < box.top || event.clientY > box.bottom)
      dialog.close();
  }
});
dialog.addEventListener("close", () => {
  dialog.replaceChildren();
  if (document.activeElement === document.body) {
    // it was opened by its address
    document.querySelector(`button[data-cell="${CSS.escape(location.hash.slice(1))}"]`)?.focus();
  }
  history.replaceState(null, "", location.pathname + location.search);
});
function openFromAddress() {
  if (location.hash.startsWith("#cell-")) openCell(location.hash.slice(1));
}
addEventListener("hashchange", openFromAddress);
openFromAddress();
