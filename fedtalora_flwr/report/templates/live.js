// Shows what api/runs says, again and again. Everything goes into the page as text: names come from elsewhere.
"use strict";

const PAUSE = 2000; // ms between two looks
const SVG = "http://www.w3.org/2000/svg";
const ticked = new Set();
const byId = (id) => document.getElementById(id);

function element(tag, { text, cls, title, href } = {}, ...children) {
  const made = document.createElement(tag);
  if (text !== undefined) made.textContent = text;
  if (cls) made.className = cls;
  if (title) made.title = title;
  if (href) made.href = href;
  made.append(...children);
  return made;
}

const known = (value) => value !== null && value !== undefined;
const percent = (share) => (known(share) ? `${(100 * share).toFixed(1)} %` : "–");
const points = (share) => (known(share) ? (100 * share).toFixed(1) : "–");

function bytes(count) {
  if (!known(count)) return "–";
  const units = ["B", "kB", "MB", "GB", "TB"];
  let at = 0;
  while (count >= 1000 && at < units.length - 1) { count /= 1000; at += 1; }
  return `${count.toFixed(at ? 1 : 0)} ${units[at]}`;
}

function duration(seconds) {
  if (!known(seconds)) return "–";
  if (seconds < 60) return `${seconds.toFixed(0)} s`;
  const minutes = Math.round(seconds / 60);
  if (minutes < 60) return `${minutes} min`;
  if (minutes < 2880) return `${Math.floor(minutes / 60)} h ${String(minutes % 60).padStart(2, "0")} min`;
  return `${Math.round(minutes / 1440)} d`;
}

function curve(found, label, word, floor) {
  const box = element("div", {}, element("small", { text: label }));
  if (!found.length) { box.append(element("div", { cls: "soft", text: "not measured yet" })); return box; }
  const width = 300, height = 88, pad = 6;
  const xs = found.map((point) => point[0]), ys = found.map((point) => point[1]);
  const low = Math.min(...ys, floor ?? Infinity), high = Math.max(...ys);
  const x = (value) => pad + (width - 2 * pad) * (xs.length > 1 ? (value - xs[0]) / (xs[xs.length - 1] - xs[0]) : 0.5);
  const y = (value) => height - pad - (height - 2 * pad) * (high > low ? (value - low) / (high - low) : 0.5);
  const svg = document.createElementNS(SVG, "svg");
  svg.setAttribute("viewBox", `0 0 ${width} ${height}`);
  svg.setAttribute("preserveAspectRatio", "none");
  svg.setAttribute("role", "img");
  svg.setAttribute("aria-label", label);
  const line = document.createElementNS(SVG, "polyline");
  line.setAttribute("points", found.map(([round, value]) => `${x(round)},${y(value)}`).join(" "));
  line.setAttribute("style", "fill:none;stroke:var(--accent);stroke-width:2;vector-effect:non-scaling-stroke");
  svg.append(line);
  for (const [round, value] of found) {
    const dot = document.createElementNS(SVG, "path"); // a point with a round cap: the picture is stretched, it is not
    dot.setAttribute("d", `M${x(round)},${y(value)}h0`);
    dot.setAttribute("style", "stroke:var(--accent);stroke-width:7;stroke-linecap:round;vector-effect:non-scaling-stroke");
    const tip = document.createElementNS(SVG, "title");
    tip.textContent = `round ${round}: ${word(value)}`;
    dot.append(tip);
    svg.append(dot);
  }
  box.append(svg, element("small", { text: `${word(low)} to ${word(high)}, rounds ${xs[0]} to ${xs[xs.length - 1]}` }));
  return box;
}

function fact(label, value) {
  return element("div", { text: label }, element("b", { text: value }));
}

function clients(run) {
  const row = element("div", { cls: "clients" });
  for (const id of run.asked) {
    const how = run.late.includes(id) ? "late" : run.waiting.includes(id) ? "waiting" : "done";
    const words = { late: "late", waiting: "trains", done: "has answered" };
    row.append(element("span", { cls: how, text: `client ${id}${how === "done" ? " ✓" : how === "late" ? " late" : ""}`,
      title: `${words[how]}, asked ${duration(run.waited_seconds)} ago` }));
  }
  return row;
}

function reportLink(run) {
  return element("a", { text: run.name, href: `report?run=${encodeURIComponent(run.name)}` });
}

function card(run) {
  const box = element("article", { cls: "run" },
    element("h3", {}, element("span", { cls: "dot running" }), reportLink(run)),
    element("div", { cls: "soft", text: [run.method, run.dataset, run.backbone, run.phase].filter(known).join(" · ") }));
  const bar = element("div", { cls: "bar" }), done = element("div");
  done.style.width = `${run.num_rounds ? (100 * run.rounds_done) / run.num_rounds : 0}%`;
  bar.append(done);
  box.append(bar, element("div", { cls: "facts" },
    fact("task", known(run.task) ? `${run.task} of ${run.num_tasks}` : "–"),
    fact("round", `${run.round ?? "–"} of ${run.num_rounds || "–"}`),
    fact("loss", known(run.mean_loss) ? run.mean_loss.toFixed(3) : "–"),
    fact("accuracy", percent(run.accuracy)),
    fact("up", bytes(run.bytes_up)), fact("down", bytes(run.bytes_down)),
    fact("time left", known(run.remaining_seconds) ? `about ${duration(run.remaining_seconds)}` : "–")));
  if (run.asked.length) {
    const word = run.waiting.length ? `waits for ${run.waiting.length} of ${run.asked.length} clients, asked ${duration(run.waited_seconds)} ago` : `all ${run.asked.length} clients have answered`;
    box.append(element("div", { cls: "soft", text: word }), clients(run));
  }
  for (const failure of run.failures) {
    box.append(element("div", { cls: "soft", text: `client ${failure.partition_id} in the last round: ${failure.reason}` }));
  }
  box.append(element("div", { cls: "curves" },
    curve(run.losses, "training loss", (value) => value.toFixed(3), 0), curve(run.accuracies, "accuracy on all seen", percent)));
  return box;
}

function row(run) {
  const tick = element("input", { title: "compare" });
  tick.type = "checkbox";
  tick.disabled = run.state === "unreadable";
  tick.checked = ticked.has(run.name);
  tick.setAttribute("aria-label", `compare ${run.name}`);
  tick.addEventListener("change", () => { tick.checked ? ticked.add(run.name) : ticked.delete(run.name); pick(); });
  const when = element("div", { cls: "soft", text: `${run.state}, last word ${new Date(1000 * run.last_word).toLocaleString()}` });
  const name = element("td", {}, element("span", { cls: `dot ${run.state}` }), run.state === "unreadable" ? run.name : reportLink(run), when);
  if (run.message) name.append(element("div", { cls: "soft", text: run.message }));
  const settings = [run.method, run.dataset, known(run.seed) ? `seed ${run.seed}` : null].filter(known).join(" · ");
  const traffic = known(run.bytes_up) && known(run.bytes_down) ? bytes(run.bytes_up + run.bytes_down) : "–";
  return element("tr", {}, element("td", {}, tick), name,
    element("td", { cls: "number", text: percent(run.accuracy) }),
    element("td", { cls: "number wide-only", text: percent(run.average_accuracy) }),
    element("td", { cls: "number wide-only", text: points(run.forgetting) }),
    element("td", { cls: "number wide-only", text: traffic }),
    element("td", { cls: "number", text: duration(run.seconds) }),
    element("td", { cls: "wide-only soft", text: settings }));
}

function pick() {
  byId("compare").disabled = ticked.size < 2;
  byId("picked").textContent = ticked.size ? `${ticked.size} ticked` : "Tick two runs or more to set them side by side.";
}

function show(found) {
  const running = found.runs.filter((run) => run.state === "running");
  const ended = found.runs.filter((run) => run.state !== "running");
  byId("running").replaceChildren(...(running.length ? running.map(card) : [element("p", { cls: "soft", text: "Nothing runs now." })]));
  const said = JSON.stringify(ended.map(({ last_word, ...rest }) => rest));
  if (said !== show.said) byId("ended").replaceChildren(...ended.map(row)); // else a tick would lose the focus
  show.said = said;
  for (const name of ticked) if (!ended.some((run) => run.name === name)) ticked.delete(name);
  pick();
}

async function look() {
  try {
    const answer = await fetch("api/runs");
    if (!answer.ok) throw new Error(`${answer.status} ${await answer.text()}`);
    show(await answer.json());
    byId("word").textContent = `as of ${new Date().toLocaleTimeString()}`;
  } catch (error) {
    byId("word").textContent = `no answer: ${error.message}`;
  }
  setTimeout(look, PAUSE);
}

byId("compare").addEventListener("click", () => {
  location.href = `compare?${[...ticked].map((name) => `run=${encodeURIComponent(name)}`).join("&")}`;
});
look();
