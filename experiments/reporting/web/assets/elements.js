// What all parts of the page use: making elements, unpacking data, saying and saving things.

/** A new element; an attribute that begins with "on" is a listener. */
function element(tag, attributes = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) made.addEventListener(name.slice(2), value);
    else if (value !== null && value !== false) made.setAttribute(name, value === true ? "" : value);
  }
  made.append(...children.flat().filter((child) => child !== null && child !== undefined && child !== ""));
  return made;
}

/** Head and body of a table; the first cell of a row is its head. */
function tableOf(heads, rows) {
  const top = heads.map((head) => element("th", { scope: "col" }, head));
  const body = rows.map((cells) =>
    element(
      "tr",
      {},
      cells.map((cell, i) => (i ? element("td", {}, cell) : element("th", { scope: "row" }, cell))),
    ),
  );
  return [element("thead", {}, element("tr", {}, top)), element("tbody", {}, body)];
}

/** The text that a script of type application/gzip holds. */
async function unpack(id) {
  const text = document.getElementById(id).textContent.trim();
  const bytes = Uint8Array.fromBase64?.(text) ?? Uint8Array.from(atob(text), (c) => c.charCodeAt(0));
  return new Response(new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"))).text();
}

/** Text as it may stand in an SVG. */
function escaped(text) {
  return new XMLSerializer().serializeToString(document.createTextNode(text));
}

function say(text) {
  const said = document.getElementById("said");
  said.textContent = "";
  setTimeout(() => (said.textContent = text), 50); // so that the same text is said again
}

async function copy(text, button) {
  let done = "Copied";
  try {
    await navigator.clipboard.writeText(text);
  } catch {
    done = "The browser does not allow to copy";
  }
  const label = button.textContent;
  button.textContent = done;
  setTimeout(() => (button.textContent = label), 1500);
  say(done);
}

function download(name, type, text) {
  const url = URL.createObjectURL(new Blob([text], { type }));
  element("a", { href: url, download: name }).click();
  setTimeout(() => URL.revokeObjectURL(url), 10000);
}
