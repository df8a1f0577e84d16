// Charts, drawn by Observable Plot when they come into view.

const PALETTE = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9"]; // Okabe and Ito
const DASHES = { solid: null, dashed: "6 3", dotted: "1.5 3" };
const WIDTH = 270,
  HEIGHT = 200;

let loading = null;
/** Observable Plot and D3, run once. */
function library() {
  loading ??= (async () => {
    for (const packed of document.querySelectorAll("script[id^=library-]")) {
      document.head.append(element("script", {}, await unpack(packed.id)));
    }
  })();
  return loading;
}

async function drawChart(figure, chart) {
  await library();
  fillChart(figure, chart);
}

/** Fill a figure with a chart: rows of subplots, a legend, and buttons to keep it. Needs the library. */
function fillChart(figure, chart) {
  const rows = chart.rows.filter((row) => row.length);
  const one = chart.legends !== "row";
  for (const row of rows) {
    figure.append(
      element(
        "div",
        { class: "plots" },
        row.map((subplot) => drawSubplot(subplot)),
      ),
    );
    if (!one) figure.append(legend(row));
  }
  if (one) figure.append(legend(rows.flat()));
  figure.append(keepers(figure));
  figure.classList.remove("waiting");
}

/** A number with four significant digits. */
function brief(value) {
  return value === null ? "" : String(Number(value.toPrecision(4)));
}

function drawSubplot(subplot) {
  const log = (scale, value) => scale !== "log" || value > 0;
  const marks = [];
  const hovered = [];
  let highest = -Infinity;
  for (const line of subplot.lines) {
    const stroke = PALETTE[line.color % PALETTE.length];
    const rows = line.x
      .map((x, i) => ({
        x,
        y: line.y[i],
        low: line.low?.[i],
        high: line.high?.[i],
        text:
          `${line.label}\n${subplot.xlabel} ${line.x[i]}: ${brief(line.y[i])}` +
          (line.low && line.low[i] !== line.high[i] ? `\n${brief(line.low[i])} to ${brief(line.high[i])}` : ""),
      }))
      .filter((row) => row.y !== null && log(subplot.yscale, row.y) && log(subplot.xscale, row.x));
    for (const row of rows) highest = Math.max(highest, row.y, row.high ?? row.y);
    const banded = line.low ? rows.filter((row) => row.low !== null && log(subplot.yscale, row.low)) : [];
    if (line.points) marks.push(Plot.ruleX(banded, { x: "x", y1: "low", y2: "high", stroke, strokeWidth: 1.5 }));
    else marks.push(Plot.areaY(banded, { x: "x", y1: "low", y2: "high", fill: stroke, fillOpacity: 0.18, clip: true }));
    marks.push(Plot.lineY(rows, { x: "x", y: "y", stroke, strokeDasharray: DASHES[line.style], clip: true }));
    if (line.points) {
      marks.push(Plot.dot(rows, { x: "x", y: "y", stroke, fill: line.low ? stroke : "none", r: 3, title: "text" }));
    }
    if (line.mark !== null && line.y[line.mark] !== null) {
      const at = [{ x: line.x[line.mark], y: line.y[line.mark] }];
      marks.push(Plot.dot(at, { x: "x", y: "y", fill: stroke, r: 4.5, title: () => "the last point before the norms are fixed" }));
    }
    if (!line.points) hovered.push(...rows);
  }
  marks.push(Plot.tip(hovered, Plot.pointer({ x: "x", y: "y", title: "text", maxRadius: 20, lineWidth: 14 })));
  if (subplot.rule !== null) marks.unshift(Plot.ruleY([subplot.rule], { strokeOpacity: 0.5 }));
  const ticks = subplot.ticks.map(([x]) => x),
    names = new Map(subplot.ticks);
  const svg = Plot.plot({
    width: WIDTH,
    height: HEIGHT,
    marginLeft: 46,
    marginRight: 18,
    marginBottom: 36,
    marginTop: 22,
    style: { background: "transparent", color: "currentColor", fontSize: "12px" },
    ariaLabel: [subplot.title, subplot.ylabel, `over ${subplot.xlabel}`].filter(Boolean).join(", "),
    x: {
      type: subplot.xscale,
      label: subplot.xlabel,
      labelAnchor: "center",
      labelArrow: "none",
      ...(ticks.length ? { ticks, tickFormat: (x) => names.get(x) ?? "" } : { ticks: 5 }),
    },
    y: {
      type: subplot.yscale,
      label: subplot.ylabel || null,
      labelArrow: "none",
      ticks: 5,
      grid: true,
      ...(subplot.yscale === "log" ? { tickFormat: "~g" } : {}),
      ...(subplot.ymin !== null ? { domain: [subplot.ymin, highest], nice: true } : {}),
    },
    ...(subplot.lines.some((line) => line.points) ? { inset: 4 } : {}),
    marks,
  });
  asImage(svg);
  return element("div", {}, subplot.title ? element("h4", {}, subplot.title) : "", svg);
}

/** One image for a screen reader, with the label of the whole; Plot labels its parts too. */
function asImage(svg) {
  svg.setAttribute("role", "img");
  for (const part of svg.querySelectorAll("[aria-label]")) part.removeAttribute("aria-label");
}

/** A swatch and a name for each line, each name once. */
function legend(subplots) {
  const lines = new Map(subplots.flatMap((subplot) => subplot.lines).map((line) => [line.label, line]));
  const items = [...lines.values()].map((line) => {
    const item = element("li");
    const dashes = DASHES[line.style] ? ` stroke-dasharray="${DASHES[line.style]}"` : "";
    const color = PALETTE[line.color % PALETTE.length];
    item.innerHTML =
      `<svg width="26" height="10" aria-hidden="true"><path d="M0 5h26" stroke="${color}" ` +
      `stroke-width="2"${dashes}/></svg>`;
    item.append(line.label);
    return item;
  });
  return element("ul", { class: "legend" }, items);
}

function keepers(figure) {
  const { name, title } = figure.dataset;
  return element(
    "figcaption",
    {},
    element(
      "button",
      {
        type: "button",
        "aria-label": `SVG of ${title}`,
        onclick: () => download(`${name}.svg`, "image/svg+xml", svgOf(figure)),
      },
      "SVG",
    ),
    element(
      "button",
      { type: "button", "aria-label": `PDF (print) of ${title}`, onclick: () => printAlone(figure) },
      "PDF (print)",
    ),
  );
}

/** The figure as one SVG: its subplots side by side as on a wide screen, and its legends. */
function svgOf(figure) {
  const picture = figure.querySelector("img");
  if (picture) return picture.dataset.svg;
  const parts = [];
  let y = 10,
    width = 0;
  const text = (content, x, size = 12) =>
    `<text x="${x}" y="${y + size}" font-size="${size}">${escaped(content)}</text>`;
  for (const block of figure.querySelectorAll(".plots, .legend")) {
    let x = 10;
    if (block.classList.contains("legend")) {
      for (const item of block.children) {
        const swatch = item.querySelector("path").cloneNode();
        swatch.setAttribute("transform", `translate(${x} ${y + 3})`);
        parts.push(swatch.outerHTML, text(item.textContent, x + 32));
        x += 50 + 7 * item.textContent.length;
      }
      y += 26;
    } else {
      const titled = block.querySelector("h4") ? 16 : 0;
      let height = 0;
      for (const subplot of block.children) {
        const svg = subplot.querySelector("svg").cloneNode(true);
        const [, , w, h] = svg.getAttribute("viewBox").split(" ").map(Number);
        if (titled) parts.push(text(subplot.querySelector("h4")?.textContent ?? "", x + 40));
        for (const [key, value] of Object.entries({ x, y: y + titled, width: w, height: h }))
          svg.setAttribute(key, value);
        parts.push(new XMLSerializer().serializeToString(svg));
        x += w + 10;
        height = Math.max(height, h);
      }
      y += height + titled + 10;
    }
    width = Math.max(width, x);
  }
  return (
    `<svg xmlns="http://www.w3.org/2000/svg" width="${width}" height="${y}" viewBox="0 0 ${width} ${y}" ` +
    `font-family="system-ui, sans-serif" fill="#1b222d" color="#1b222d"><title>${escaped(figure.dataset.title)}</title>` +
    `<rect width="100%" height="100%" fill="#fff"/>${parts.join("")}</svg>`
  );
}

/** Print a figure on a page of its own size, which browsers save as PDF. */
function printAlone(figure) {
  const { width, height } = figure.getBoundingClientRect();
  const style = element(
    "style",
    {},
    `@page { size: ${Math.ceil(width) + 2}px ${Math.ceil(height) + 2}px; margin: 0; }`,
  );
  const alone = element("div", { class: "alone", style: `width: ${Math.ceil(width)}px` }, figure.cloneNode(true));
  document.head.append(style);
  document.body.append(alone);
  document.body.classList.add("one-figure");
  addEventListener(
    "afterprint",
    () => {
      style.remove();
      alone.remove();
      document.body.classList.remove("one-figure");
    },
    { once: true },
  );
  print();
}

const figures = [...document.querySelectorAll("figure[data-chart], figure[data-packed]")];
const pictures = new Map(); // the SVG of figures that are no charts

/** Unpack what a figure is drawn from or with. */
async function prepare(figure) {
  if (figure.dataset.chart) await library();
  else if (!pictures.has(figure)) pictures.set(figure, await unpack(figure.dataset.packed));
}

/** Draw a figure that has been prepared. */
function fill(figure) {
  if (figure.dataset.drawn || !(figure.dataset.chart ? window.Plot : pictures.has(figure))) return;
  figure.dataset.drawn = "true";
  if (figure.dataset.chart) fillChart(figure, JSON.parse(document.getElementById(figure.dataset.chart).textContent));
  else fillPicture(figure, pictures.get(figure));
}

function fillPicture(figure, svg) {
  const url = URL.createObjectURL(new Blob([svg], { type: "image/svg+xml" }));
  const picture = element("img", { alt: figure.dataset.title, src: url });
  picture.dataset.svg = svg;
  const scroll = element(
    "div",
    { class: "scroll", tabindex: "0", role: "region", "aria-label": figure.dataset.title },
    picture,
  );
  figure.append(scroll, keepers(figure));
  figure.classList.remove("waiting");
}

async function drawFigure(figure) {
  await prepare(figure);
  fill(figure);
}

const watcher = new IntersectionObserver(
  (entries) => {
    for (const { target, isIntersecting } of entries) {
      if (isIntersecting) {
        watcher.unobserve(target);
        drawFigure(target);
      }
    }
  },
  { rootMargin: "400px" },
);
for (const figure of figures) {
  figure.classList.add("waiting");
  watcher.observe(figure);
}

// Printing does not wait, so all figures are prepared once there is time.
addEventListener("beforeprint", () => figures.forEach(fill));
addEventListener("load", () => {
  const idle = window.requestIdleCallback ?? ((then) => setTimeout(then, 500));
  idle(async () => {
    for (const figure of figures) await prepare(figure);
  });
});
