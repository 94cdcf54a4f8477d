"use strict";
// Draws the figures and lists the answers. Text from data sets is only ever set as text, never as markup.

const read = (id) => JSON.parse(document.getElementById(id).textContent);
const figures = read("figure-data");
const dark = matchMedia("(prefers-color-scheme: dark)");
const touch = matchMedia("(pointer: coarse)");

// --- figures

function coloured(value, style) {
  if (typeof value === "string") {
    return value.startsWith("var(") ? style.getPropertyValue(value.slice(4, -1)).trim() : value;
  }
  if (Array.isArray(value)) return value.map((item) => coloured(item, style));
  if (value === null || typeof value !== "object") return value;
  return Object.fromEntries(Object.entries(value).map(([key, item]) => [key, coloured(item, style)]));
}

function axis(given) {
  return {
    gridcolor: "var(--line)", linecolor: "var(--line)", zeroline: false, fixedrange: true, automargin: true,
    tickfont: { color: "var(--muted)", size: 12 }, ...given,
    title: { standoff: 8, ...given.title, font: { color: "var(--muted)", size: 12 } },
  };
}

const hidden = new Set();

function draw(node) {
  const { data, layout } = figures[node.dataset.figure];
  const { zoomable = false, ...given } = layout;
  const zooms = zoomable && !touch.matches;
  const full = {
    margin: { l: 46, r: 10, t: 22, b: 44 }, showlegend: false, hovermode: "closest", dragmode: zooms ? "zoom" : false,
    paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)", ...given,
    font: { family: getComputedStyle(document.body).fontFamily, color: "var(--ink)", size: 13 },
    hoverlabel: { bgcolor: "var(--panel)", bordercolor: "var(--line)", font: { color: "var(--ink)", size: 13 }, align: "left" },
    xaxis: axis({ ...given.xaxis, fixedrange: !zooms }), yaxis: axis({ ...given.yaxis, fixedrange: !zooms }),
  };
  const traces = data.map(({ texts, ...trace }) => ({
    ...trace,
    ...(texts && { text: texts.map((row) => texts.map((column) => `${row}<br>× ${column}`)) }),
    visible: !(trace.legendgroup && hidden.has(trace.legendgroup)),
  }));
  const style = getComputedStyle(document.documentElement);
  const options = { displayModeBar: false, responsive: true };
  return Plotly.react(node, coloured(traces, style), coloured(full, style), options);
}

const plots = [...document.querySelectorAll(".plot")];

// One after the other, so that the page can be read and scrolled before the last one stands.
async function drawAll() {
  for (const node of plots) {
    await draw(node);
    node.dataset.drawn = "";
    await new Promise((next) => setTimeout(next));
  }
  document.documentElement.dataset.ready = "";
}

for (const key of document.querySelectorAll("button[data-group]")) {
  key.addEventListener("click", () => {
    const group = key.dataset.group;
    hidden.delete(group) || hidden.add(group);
    for (const other of document.querySelectorAll(`button[data-group="${group}"]`)) {
      other.setAttribute("aria-pressed", String(!hidden.has(group)));
    }
    plots.filter((node) => figures[node.dataset.figure].data.some((trace) => trace.legendgroup === group)).forEach(draw);
  });
}
for (const choice of document.querySelectorAll("input[name=axes]")) {
  choice.addEventListener("change", () => {
    for (const node of plots.filter((candidate) => candidate.dataset.shared)) {
      node.dataset.figure = choice.value === "shared" ? node.dataset.shared : node.dataset.own;
      draw(node);
    }
  });
}
dark.addEventListener("change", () => plots.forEach(draw));

// --- answers

const CLASSES = { seemingly_toxic: "Seemingly toxic", toxic: "Toxic", general: "General" };
const VERDICTS = {
  full_refusal: ["refused", "refused"], partial_refusal: ["refused in part", "refused"], compliance: ["complied", "complied"],
  degenerate: ["degenerate", "degenerate"], undetermined: ["unclear", "unclear"],
};
const PAGE = 10;

function element(tag, text, name) {
  const made = document.createElement(tag);
  if (text !== undefined) made.textContent = text;
  if (name) made.className = name;
  return made;
}

function side(answer, model) {
  const made = element("div", undefined, "side");
  const head = made.appendChild(element("header", model));
  const [words, name] = VERDICTS[answer.label] ?? [answer.label, "unclear"];
  const verdict = head.appendChild(element("span", words, `verdict ${name}`));
  verdict.title = `refusal probability ${answer.probability.toFixed(2)}`;
  made.appendChild(element("p", answer.text.trim() || "(empty)"));
  return made;
}

function example(row, models) {
  const made = element("article", undefined, "answer");
  const head = made.appendChild(element("h3"));
  head.appendChild(element("small", row.suite ? `${CLASSES[row.class]} · ${row.suite}` : CLASSES[row.class], row.class));
  head.append(row.prompt);
  const sides = made.appendChild(element("div", undefined, "sides"));
  sides.style.setProperty("--columns", models.length);
  row.answers.forEach((answer, i) => sides.appendChild(side(answer, models[i])));
  return made;
}

const refused = (answer) => answer.probability >= 0.5;
const changed = {
  "": () => true,
  verdict: (row) => new Set(row.answers.map(refused)).size > 1,
  refuses: (row) => !refused(row.answers[0]) && refused(row.answers.at(-1)),
  answers: (row) => refused(row.answers[0]) && !refused(row.answers.at(-1)),
};

function listAnswers(box) {
  const { models, rows } = read(box.dataset.answers);
  const [list, form, count, more] = ["list", "form", "output", "button.more"].map((name) =>
    box.querySelector(name === "list" ? ".list" : name));
  let shown = PAGE;
  function show() {
    const chosen = new FormData(form);
    const wanted = (chosen.get("text") ?? "").toLowerCase();
    const found = rows.filter((row) =>
      (!chosen.get("class") || row.class === chosen.get("class")) &&
      (!chosen.get("suite") || row.suite === chosen.get("suite")) &&
      changed[chosen.get("change") ?? ""](row) &&
      (!wanted || [row.prompt, ...row.answers.map((answer) => answer.text)].some((text) => text.toLowerCase().includes(wanted))));
    list.replaceChildren(...found.slice(0, shown).map((row) => example(row, models)));
    count.textContent = `${found.length} of ${rows.length} prompts`;
    more.hidden = found.length <= shown;
  }
  form.addEventListener("submit", (event) => event.preventDefault());
  form.addEventListener("input", () => { shown = PAGE; show(); });
  more.addEventListener("click", () => { shown += PAGE; show(); });
  show();
}

document.querySelectorAll("[data-answers]").forEach(listAnswers);
drawAll();
