// The state of the runs, asked of the server (python -m experiments serve).

const INTERVAL = 5000; // ms
const shown = document.body.dataset.version; // of the records

async function refresh() {
  const summary = document.getElementById("live-summary");
  let text;
  try {
    const answer = await fetch("status.json", { cache: "no-store" });
    const { rows, version, error } = await answer.json();
    text = error ?? describe(rows);
    showRows(rows);
    if (!error && version !== shown) text += " New records: load the page again to see them.";
  } catch {
    text = "The server does not answer; it may have ended.";
  }
  if (summary.textContent !== text) summary.textContent = text;
  setTimeout(refresh, INTERVAL);
}

function describe(rows) {
  if (!rows.length) return "No experiment was named: python -m experiments serve NAME shows the state of its runs.";
  const count = (key) => rows.reduce((sum, row) => sum + (Number(row[key]) || 0), 0);
  const done = rows.map((row) =>
    String(row.done ?? "0/0")
      .split("/")
      .map(Number),
  );
  const sum = (i) => done.reduce((total, pair) => total + pair[i], 0);
  return `${sum(0)} of about ${sum(1)} runs are done, ${count("running")} running, ${count("queued")} queued, ${count("failed")} failed.`;
}

function showRows(rows) {
  const table = document.getElementById("live-table");
  const heads = ["cell", "epochs", "done", "queued", "running", "failed", "time left"];
  const cells = rows.map((row) => heads.map((head) => String(row[head] ?? "")));
  table.replaceChildren(...(rows.length ? tableOf(heads, cells) : []));
}

refresh();
