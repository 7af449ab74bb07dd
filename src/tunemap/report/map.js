// The interactive trade-off map and the cards of the report. Plain SVG and no library: each point is a link, so that
// keyboard, screen reader, dark mode and print work as for any text, and the page stays small enough for a mail.
(() => {
  "use strict";
  const data = JSON.parse(document.getElementById("map-data").textContent);
  const root = document.getElementById("map");
  const SVG = "http://www.w3.org/2000/svg";
  const HEIGHT = 440, MARGIN = { top: 14, right: 22, bottom: 48, left: 84 };
  const MOST_LABELS = 14;
  const SHAPES = [ // as in the figures: o s D ^ v P X h, in a square of ±1
    "M-1 0A1 1 0 1 1 1 0A1 1 0 1 1-1 0Z", "M-.9-.9H.9V.9H-.9Z", "M0-1.2L1.2 0 0 1.2-1.2 0Z", "M0-1.15L1.1.9H-1.1Z",
    "M0 1.15L1.1-.9H-1.1Z", "M-.4-1.1H.4V-.4H1.1V.4H.4V1.1H-.4V.4H-1.1V-.4H-.4Z",
    "M-1.1-.7L-.7-1.1 0-.4 .7-1.1 1.1-.7 .4 0 1.1.7 .7 1.1 0 .4-.7 1.1-1.1.7-.4 0Z",
    "M0-1.1L.95-.55V.55L0 1.1-.95.55V-.55Z",
  ];

  // --- small tools ---

  const element = (name, attributes = {}, ...children) => {
    const made = document.createElement(name);
    for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
    made.append(...children);
    return made;
  };
  const drawn = (parent, name, attributes, text) => {
    const made = document.createElementNS(SVG, name);
    for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
    if (text !== undefined) made.textContent = text;
    parent.append(made);
    return made;
  };
  const unique = (values) => [...new Set(values)];
  const number = (value) => value === 0 ? "0" : Math.abs(value) >= 1000 ? Math.round(value).toLocaleString("en-US")
    : String(+value.toPrecision(3));
  const withInterval = (triple) => {
    if (!triple) return "not known";
    const [middle, low, high] = triple;
    return low === null || low === high ? number(middle) : `${number(middle)} (${number(low)} to ${number(high)})`;
  };
  const title = (key) => data.axes[key].label;
  const gpuName = (point) => point.gpus > 1 ? `${point.gpus} × ${point.device}` : point.device;

  // --- controls ---

  const controls = root.querySelector(".controls");
  const choice = (label, options, chosen) => {
    const select = element("select");
    for (const [value, text, disabled] of options) {
      const option = element("option", { value }, text);
      option.disabled = Boolean(disabled);
      option.selected = value === chosen;
      select.append(option);
    }
    select.addEventListener("change", draw);
    controls.append(element("label", {}, label, select));
    return select;
  };
  const filter = (label, values, key, decorate) => {
    const chosen = new Set(values);
    if (values.length < 2 && key !== "method") return { has: () => true };
    const group = element("fieldset", {}, element("legend", {}, label));
    for (const value of values) {
      const box = element("input", { type: "checkbox", name: key, value });
      box.checked = true;
      box.addEventListener("change", () => {
        if (box.checked) chosen.add(value); else chosen.delete(value);
        draw();
      });
      group.append(element("label", {}, box, ...(decorate ? [decorate(value)] : []), value));
    }
    controls.append(group);
    return chosen;
  };
  const swatch = (method) => {
    const picture = document.createElementNS(SVG, "svg");
    for (const [key, value] of Object.entries({ viewBox: "-1.5 -1.5 3 3", class: "swatch", "aria-hidden": "true" }))
      picture.setAttribute(key, value);
    const { colour, marker } = data.methods[method];
    drawn(picture, "path", { d: SHAPES[marker], fill: colour });
    return picture;
  };

  const experiments = unique(data.points.map((point) => point.experiment));
  const places = unique(data.points.map((point) => point.place));
  const axes = Object.entries(data.axes).map(([key, axis]) =>
    [key, axis.known ? axis.label : `${axis.label} (not measured here)`, !axis.known]);
  const experiment = choice("Experiment", [...experiments.map((name) => [name, name]), ["", "all experiments"]], data.main);
  const place = places.length > 1 ? choice("Model and data", places.map((name) => [name, name]), places[0]) : { value: places[0] };
  const across = choice("Across", axes, "memory");
  const up = choice("Up", axes, "throughput");
  const methods = filter("Method", Object.keys(data.methods), "method", swatch);
  const strategies = filter("Strategy", unique(data.points.map((point) => point.strategy)), "strategy");
  const gpus = filter("GPU", unique(data.points.map(gpuName)), "gpu");

  const needs = data.points.filter((point) => point.memory).map((point) => point.memory[2] ?? point.memory[0]);
  const least = Math.min(...needs) * 0.8, most = Math.max(...needs) * 1.25;
  const STEPS = 200;
  const slider = element("input", { type: "range", min: 0, max: STEPS, value: STEPS, id: "budget" });
  const budgetText = element("output", { for: "budget" });
  const budget = () => +slider.value === STEPS ? Infinity : least * (most / least) ** (slider.value / STEPS);
  if (needs.length) {
    slider.addEventListener("input", draw);
    controls.append(element("label", { class: "budget", for: "budget" }, "My GPU has ", budgetText, slider));
  }

  // --- the drawing ---

  const canvas = root.querySelector(".canvas");
  const tip = element("div", { class: "tip", role: "status" });
  const verdict = root.querySelector(".fits");
  const missing = root.querySelector(".missing");

  function scale(values, ends, less) {
    const high = Math.max(...ends.filter((value) => value <= 2 * Math.max(...values)), ...values);
    let low = Math.min(...values) < 0.5 * Math.max(...values) ? 0 : Math.min(...values, ...ends);
    if (high === low) low = 0.9 * high - 1e-9;
    const span = high - low, begin = low === 0 ? 0 : Math.max(0, low - 0.12 * span), end = high + 0.12 * span;
    const rough = (end - begin) / 5, power = 10 ** Math.floor(Math.log10(rough));
    const step = [1, 2, 2.5, 5, 10].find((factor) => factor * power >= rough) * power;
    const ticks = [];
    for (let at = Math.ceil(begin / step) * step; at <= end + 1e-9; at += step) ticks.push(+at.toPrecision(10));
    return { begin, end, ticks };
  }

  function draw() {
    const limit = budget();
    const need = (point) => point.memory ? point.memory[2] ?? point.memory[0] : null;
    const chosen = data.points.filter((point) =>
      (!experiment.value || point.experiment === experiment.value) && point.place === place.value &&
      methods.has(point.method) && strategies.has(point.strategy) && gpus.has(gpuName(point)));
    const seen = new Set(); // the same runs can be points of several experiments
    const shown = chosen.filter((point) => {
      if (!point[across.value] || !point[up.value]) return false;
      const name = experiment.value ? point.card : JSON.stringify([point.method, point.memory, point.throughput, point.accuracy]);
      return !seen.has(name) && seen.add(name);
    });
    budgetText.textContent = limit === Infinity ? "no limit" : `${number(limit)} ${data.memory_unit}`;
    slider.setAttribute("aria-valuetext", budgetText.textContent);
    canvas.replaceChildren();
    tip.hidden = true;
    say(shown, chosen, need, limit);
    if (!shown.length) {
      canvas.append(element("p", { class: "quiet" }, "No point has both values under these filters."));
      return;
    }
    const width = Math.max(300, canvas.clientWidth);
    const svg = drawn(canvas, "svg", { viewBox: `0 0 ${width} ${HEIGHT}`, width, height: HEIGHT, role: "group",
      "aria-label": `${shown.length} points: ${title(up.value)} against ${title(across.value)}` });
    const values = (key, place) => shown.map((point) => point[key][place] ?? point[key][0]);
    const ends = (key) => [...values(key, 1), ...values(key, 2)];
    const xs = scale(values(across.value, 0), ends(across.value)), ys = scale(values(up.value, 0), ends(up.value));
    const inner = width - MARGIN.left - MARGIN.right, tall = HEIGHT - MARGIN.top - MARGIN.bottom;
    const x = (value) => MARGIN.left + inner * (Math.min(value, xs.end) - xs.begin) / (xs.end - xs.begin);
    const y = (value) => MARGIN.top + tall * (1 - (Math.min(value, ys.end) - ys.begin) / (ys.end - ys.begin));
    const bottom = HEIGHT - MARGIN.bottom, right = width - MARGIN.right;
    const everyOther = width < 480 ? 2 : 1;
    xs.ticks.forEach((tick, index) => {
      drawn(svg, "line", { x1: x(tick), x2: x(tick), y1: MARGIN.top, y2: bottom, class: "grid" });
      if (index % everyOther === 0)
        drawn(svg, "text", { x: x(tick), y: bottom + 18, "text-anchor": "middle", class: "tick" }, number(tick));
    });
    for (const tick of ys.ticks) {
      drawn(svg, "line", { x1: MARGIN.left, x2: right, y1: y(tick), y2: y(tick), class: "grid" });
      drawn(svg, "text", { x: MARGIN.left - 8, y: y(tick) + 4, "text-anchor": "end", class: "tick" }, number(tick));
    }
    drawn(svg, "text", { x: (MARGIN.left + right) / 2, y: HEIGHT - 8, "text-anchor": "middle", class: "axis" },
      `${title(across.value)} (${data.axes[across.value].less ? "← less" : "more →"} is better)`);
    drawn(svg, "text", { transform: `translate(15 ${(MARGIN.top + bottom) / 2}) rotate(-90)`, "text-anchor": "middle", class: "axis" },
      `${title(up.value)} (${data.axes[up.value].less ? "↓ less" : "more ↑"} is better)`);
    if (across.value === "memory" && limit < xs.end) { // what does not fit is shaded
      const from = x(Math.max(limit, xs.begin));
      drawn(svg, "rect", { x: from, y: MARGIN.top, width: right - from, height: tall, class: "beyond" });
      drawn(svg, "line", { x1: from, x2: from, y1: MARGIN.top, y2: bottom, class: "limit" });
    }
    const taken = shown.map((point) => box(x(point[across.value][0]) - 9, y(point[up.value][0]) - 9, 18, 18));
    for (const point of shown) for (const [key, at] of [[across.value, 0], [up.value, 1]]) { // labels keep off the bars
      const [, low, high] = point[key];
      if (low === null || low === high) continue;
      const px = x(point[across.value][0]), py = y(point[up.value][0]);
      taken.push(at ? box(px - 2, y(high), 4, y(Math.max(low, 0)) - y(high)) : box(x(Math.max(low, 0)), py - 2, x(high) - x(Math.max(low, 0)), 4));
    }
    for (const point of shown) mark(svg, point, x, y, need(point) !== null && need(point) > limit);
    const bounds = { left: MARGIN.left, right: width - 4, top: 2, bottom };
    const named = shown.length <= MOST_LABELS ? shown : shown.filter((point) => point.front === "on the front");
    for (const point of named) label(svg, point, x(point[across.value][0]), y(point[up.value][0]), taken, bounds);
    canvas.append(tip);
  }

  function mark(svg, point, x, y, tooLarge) {
    const { colour, marker } = data.methods[point.method];
    const [px, xlow, xhigh] = point[across.value], [py, ylow, yhigh] = point[up.value];
    const link = drawn(svg, "a", { href: `#${point.card}`, class: tooLarge ? "point beyond-budget" : "point",
      "aria-label": describe(point).join(", ") + (tooLarge ? ", does not fit" : ""), "data-label": point.label });
    const bar = { stroke: colour, class: "bar" };
    if (xlow !== null && xlow !== xhigh) drawn(link, "line", { x1: x(Math.max(xlow, 0)), x2: x(xhigh), y1: y(py), y2: y(py), ...bar });
    if (ylow !== null && ylow !== yhigh) drawn(link, "line", { x1: x(px), x2: x(px), y1: y(Math.max(ylow, 0)), y2: y(yhigh), ...bar });
    const shape = { d: SHAPES[marker], transform: `translate(${x(px)} ${y(py)}) scale(7)`, stroke: colour,
      "stroke-width": 0.25 };
    drawn(link, "path", { ...shape, class: "ground" });
    drawn(link, "path", { ...shape, fill: colour,
      "fill-opacity": { "on the front": 1, beaten: 0 }[point.front] ?? 0.4 });
    drawn(link, "circle", { cx: x(px), cy: y(py), r: 16, class: "target" }); // easier to hit with a finger
    for (const event of ["mouseenter", "focus"]) link.addEventListener(event, () => show(point, x(px), y(py)));
    for (const event of ["mouseleave", "blur"]) link.addEventListener(event, () => { tip.hidden = true; });
  }

  const box = (left, top, width, height) => ({ left, top, right: left + width, bottom: top + height });
  const overlap = (a, b) => a.left < b.right && b.left < a.right && a.top < b.bottom && b.top < a.bottom;

  function label(svg, point, px, py, taken, bounds) {
    const lines = point.label.split(" · ");
    if (point.accuracy && across.value !== "accuracy" && up.value !== "accuracy") lines.push(`${number(point.accuracy[0])} %`);
    const text = drawn(svg, "text", { class: "label" });
    lines.forEach((line, index) => drawn(text, "tspan", { x: 0, dy: index ? "1.15em" : "0.85em" }, line));
    const { width, height } = text.getBBox();
    for (const gap of [12, 20, 32]) {
      for (const [left, top] of [[gap, -height / 2], [-gap - width, -height / 2], [-width / 2, gap], [-width / 2, -gap - height],
        [gap * 0.7, gap * 0.7], [gap * 0.7, -gap * 0.7 - height], [-gap * 0.7 - width, gap * 0.7], [-gap * 0.7 - width, -gap * 0.7 - height]]) {
        const here = box(px + left, py + top, width, height);
        const inside = here.left >= bounds.left && here.right <= bounds.right && here.top >= bounds.top && here.bottom <= bounds.bottom;
        if (!inside || taken.some((other) => overlap(here, other))) continue;
        taken.push(here);
        for (const line of text.children) line.setAttribute("x", here.left);
        text.setAttribute("y", here.top);
        return;
      }
    }
    text.remove();
  }

  const describe = (point) => [
    point.label,
    `${point.seeds} of ${point.runs} runs ok${point.failures ? ` (${point.failures})` : ""}`,
    ...Object.keys(data.axes).filter((key) => point[key]).map((key) => `${title(key)}: ${withInterval(point[key])}`),
    point.front ? `Pareto front of memory, throughput, accuracy: ${point.front} (${Math.round(100 * point.probability)} % to be on it)`
      : "Pareto front: not known",
  ];

  function show(point, px, py) {
    const [head, ...rest] = describe(point);
    tip.replaceChildren(element("strong", {}, head), ...rest.map((line) => element("div", {}, line)),
      element("div", { class: "quiet" }, "click for its runs"));
    tip.hidden = false;
    const room = canvas.clientWidth;
    tip.style.left = `${Math.max(4, Math.min(px + 14, room - tip.offsetWidth - 4))}px`;
    tip.style.top = `${py + 18}px`;
  }

  function say(shown, chosen, need, limit) {
    const fitting = chosen.filter((point) => need(point) !== null && need(point) <= limit);
    const best = (key, less) => fitting.filter((point) => point[key]).sort((a, b) =>
      less ? a[key][0] - b[key][0] : b[key][0] - a[key][0])[0];
    const parts = [`${shown.length} points shown.`];
    if (limit < Infinity) {
      parts.push(`${fitting.length} of ${chosen.length} fit into ${number(limit)} ${data.memory_unit} of peak allocated memory.`);
      const accurate = best("accuracy"), fast = best("throughput");
      if (accurate) parts.push(`Highest mean accuracy among them: ${accurate.label}, ${withInterval(accurate.accuracy)} %.`);
      if (fast) parts.push(`Highest mean throughput: ${fast.label}, ${withInterval(fast.throughput)} tokens/s.`);
      parts.push("A device also needs room for its context and the allocator's cache.");
    }
    verdict.textContent = parts.join(" ");
    missing.replaceChildren();
    const lost = chosen.filter((point) => !point[across.value] || !point[up.value]);
    if (lost.length) {
      missing.append("Not on the map: ");
      lost.forEach((point, index) => missing.append(index ? "; " : "",
        element("a", { href: `#${point.card}` }, point.label), ` (${point.failures || "value not measured"})`));
      missing.append(".");
    }
  }

  let drawnAt = 0;
  const redraw = () => { if (canvas.clientWidth !== drawnAt) { drawnAt = canvas.clientWidth; draw(); } };
  if (data.points.length) {
    root.hidden = false;
    drawnAt = canvas.clientWidth;
    draw();
    new ResizeObserver(redraw).observe(canvas);
  }
})();

// Cards open over the page by CSS alone (:target). This adds what CSS cannot: focus, Escape, and the way back.
(() => {
  "use strict";
  let opener = null, scroll = 0;
  const current = () => document.querySelector(".card:target");
  const close = () => {
    if (!current()) return;
    location.hash = "#_"; // a name that nothing has, so that the page stays where it is
    history.replaceState(null, "", location.pathname + location.search);
    window.scrollTo(0, scroll);
    opener?.focus({ preventScroll: true });
  };
  document.addEventListener("click", (event) => {
    const link = event.target.closest('a[href^="#"]');
    if (link?.classList.contains("close")) { event.preventDefault(); close(); return; }
    const id = link && decodeURIComponent(link.getAttribute("href").slice(1));
    const card = id && document.getElementById(id);
    if (!card?.classList.contains("card")) return;
    if (!current()) { opener = link; scroll = window.scrollY; }
    requestAnimationFrame(() => { card.scrollTop = 0; card.focus({ preventScroll: true }); window.scrollTo(0, scroll); });
  });
  document.addEventListener("click", (event) => {
    if (current() && !event.target.closest(".card") && !event.target.closest('a[href^="#"]')) close();
  });
  document.addEventListener("keydown", (event) => { if (event.key === "Escape") close(); });
  for (const button of document.querySelectorAll("button.copy")) {
    if (!navigator.clipboard) break; // browsers offer it to files and https pages only
    button.hidden = false;
    button.addEventListener("click", async () => {
      await navigator.clipboard.writeText(button.parentElement.querySelector("code").textContent);
      button.textContent = "copied";
    });
  }
  addEventListener("beforeprint", () => { for (const one of document.querySelectorAll("details.printed")) one.open = true; });
})();
