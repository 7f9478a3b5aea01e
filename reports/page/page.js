"use strict";
// Sorting, filtering, unfolding and charts of one report. All text reaches the page as text, never as markup.
(() => {
  const cells = JSON.parse(document.getElementById("cells").textContent);
  const byId = (id) => document.getElementById(id);
  const SVG = "http://www.w3.org/2000/svg";
  const make = (tag, attributes = {}, text) => {
    const node = document.createElement(tag);
    for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
    if (text !== undefined) node.textContent = text;
    return node;
  };
  const draw = (tag, attributes = {}, text) => {
    const node = document.createElementNS(SVG, tag);
    for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
    if (text !== undefined) node.textContent = text;
    return node;
  };
  const digits = (x) => x >= 1e4 ? String(Number(x.toPrecision(4))) : x >= 100 ? x.toFixed(0) : x >= 10 ? x.toFixed(1) : x >= 0.1 ? x.toFixed(2) : x.toPrecision(2);
  const big = (x, unit) => x >= 1e12 ? `${digits(x / 1e12)} T${unit}` : `${digits(x / 1e9)} G${unit}`;
  const power = (x) => {
    const e = Math.round(Math.log10(x));
    return e >= 0 && e < 5 ? String(10 ** e) : e < 0 && e > -3 ? (10 ** e).toFixed(-e) : "1e" + e;
  };
  const colours = new Map(cells.map((c) => [c.backend, c.colour]));
  const colour = (backend) => `var(--s${colours.get(backend)})`;
  const label = (c) => `${c.backend} ${c.scheme}`;
  // What tells a cell from the others of its list, as short as that goes.
  const named = (c, list) => {
    const several = (key) => new Set(list.map((d) => d[key]).filter((v) => v !== null && v !== "")).size > 1;
    return [label(c), several("hardware") && c.hardware, several("model") && c.model, several("workload") && c.workload,
      several("threads") && c.threads && `${c.threads} thread${c.threads === 1 ? "" : "s"}`].filter(Boolean).join(" · ");
  };
  const rows = [...document.querySelectorAll("tr.cell")];
  const cellOf = new Map(rows.filter((r) => r.dataset.i).map((r) => [Number(r.dataset.i), r]));

  // Filters.
  const form = byId("filters");
  const shown = () => cells.filter((c) => !cellOf.get(c.i)?.hidden);
  const wanted = () => Object.fromEntries([...form.elements].filter((e) => e.name).map((e) => [e.name, e.value]));
  function filter() {
    const want = wanted();
    const words = want.text.toLowerCase().split(/\s+/).filter(Boolean);
    let count = 0;
    for (const row of rows) {
      const fits = ["hardware", "model", "backend", "cls", "verdict"].every((k) => !want[k] || row.dataset[k] === want[k]);
      const text = row.textContent.toLowerCase();
      row.hidden = !(fits && words.every((w) => text.includes(w)));
      if (row.detail) row.detail.hidden = row.hidden;
      count += row.hidden ? 0 : 1;
    }
    byId("count").textContent = `${count} of ${rows.length} lines shown`;
    for (const section of document.querySelectorAll("section.rows")) {
      const own = [...section.querySelectorAll("tr.cell")];
      section.querySelector(".nothing").hidden = own.some((r) => !r.hidden);
    }
    charts();
  }
  form.addEventListener("input", filter);
  form.addEventListener("submit", (e) => e.preventDefault());
  form.addEventListener("reset", () => setTimeout(filter));

  // Sorting: what is missing comes last whichever way.
  function sort(table, column, direction) {
    const body = table.tBodies[0];
    const heads = [...table.tHead.rows[0].cells];
    const numeric = heads[column].dataset.type === "number";
    const key = (row) => row.cells[column].dataset.v ?? "";
    const own = [...body.querySelectorAll("tr.cell")];
    own.sort((a, b) => {
      const x = key(a), y = key(b);
      if (x === "" || y === "") return (x === "") - (y === "");
      const order = numeric ? Number(x) - Number(y) : x.localeCompare(y, "en", { numeric: true });
      return direction * order;
    });
    for (const row of own) {
      body.append(row);
      if (row.detail) body.append(row.detail);
    }
    heads.forEach((h, i) => h.setAttribute("aria-sort", i !== column ? "none" : direction > 0 ? "ascending" : "descending"));
  }
  for (const table of document.querySelectorAll("table.cards")) {
    [...table.tHead.rows[0].cells].forEach((head, i) => {
      head.setAttribute("aria-sort", "none");
      const button = make("button", { type: "button" });
      button.append(...head.childNodes);
      head.append(button);
      button.addEventListener("click", () => {
        const first = head.dataset.first === "down" ? -1 : 1;
        const now = head.getAttribute("aria-sort");
        sort(table, i, now === "none" ? first : now === "ascending" ? -1 : 1);
      });
    });
  }
  byId("sort").addEventListener("change", (e) => {
    const [key, direction] = e.target.value.split(" ");
    for (const table of document.querySelectorAll("table.cards")) {
      const at = [...table.tHead.rows[0].cells].findIndex((h) => h.dataset.key === key);
      if (at >= 0) sort(table, at, Number(direction));
    }
  });

  // Details of one cell.
  function toggle(row, open) {
    const button = row.querySelector(".more");
    const now = open ?? button.getAttribute("aria-expanded") !== "true";
    button.setAttribute("aria-expanded", String(now));
    if (!now) {
      row.detail?.remove();
      row.detail = null;
    } else if (!row.detail) {
      row.detail = details(cells[Number(row.dataset.i)], row.cells.length);
      row.after(row.detail);
    }
  }
  for (const row of cellOf.values()) {
    row.addEventListener("click", (e) => {
      if (getSelection().isCollapsed || e.target.closest("button")) toggle(row);
    });
  }
  function details(c, span) {
    const row = make("tr", { class: "detail", role: "row", id: `d${c.i}` });
    const box = make("td", { colspan: span, role: "cell" });
    const list = make("dl");
    for (const [name, text] of c.facts) {
      list.append(make("dt", {}, name));
      const what = make("dd");
      what.append(name === "command" ? make("code", {}, text) : text);
      if (name === "command") what.append(copier(text));
      list.append(what);
    }
    const strips = make("div", { class: "strips" });
    for (const t of c.times) strips.append(strip(c, t));
    box.append(strips, list);
    row.append(box);
    return row;
  }
  function copier(text) {
    const button = make("button", { type: "button", class: "copy" }, "copy");
    button.addEventListener("click", async () => {
      try {
        await navigator.clipboard.writeText(text);
        button.textContent = "copied";
      } catch {
        getSelection().selectAllChildren(button.previousElementSibling);
        button.textContent = "selected";
      }
    });
    return button;
  }
  function strip(c, t) {
    const figure = make("figure");
    const seconds = t.unit === "s" && t.v < 1;
    const scale = seconds ? 1e3 : 1, unit = seconds ? "ms" : t.unit;
    const interval = t.lo === null ? "no interval (fewer than 6 samples)" : `95 % interval ${digits(t.lo * scale)} to ${digits(t.hi * scale)}`;
    const caption = make("figcaption");
    caption.append(make("b", {}, `${t.metric} ${digits(t.v * scale)} ${unit}`), ` · ${interval}`);
    const notes = [`${t.n} sample${t.n === 1 ? "" : "s"}${t.n > t.samples.length ? `, ${t.samples.length} drawn` : ""}`,
      t.stopped, t.blocks, t.steps && `steps: ${t.steps}`, t.roofline && `roofline: ${t.roofline}`].filter(Boolean);
    caption.append(make("br"), notes.join(" · "));
    figure.append(caption);
    if (t.samples.length > 1) figure.append(run(t, scale, unit, c));
    return figure;
  }
  // Samples in the order in which they were taken, median and interval behind them.
  function run(t, scale, unit, c) {
    const samples = t.samples.map((s) => s * scale), out = new Set(t.out);
    const [lo, hi, mid] = [t.lo * scale, t.hi * scale, t.v * scale];
    const least = Math.min(...samples), most = Math.max(...samples);
    const left = 14 + 7 * Math.max(digits(least).length, digits(most).length);
    const width = 300, height = 84, right = 6, top = 8, bottom = 16, room = (most - least || most || 1) * 0.08;
    const y = (v) => top + (height - top - bottom) * (1 - (v - least + room) / (most - least + 2 * room));
    const x = (i) => left + (width - left - right) * (samples.length === 1 ? 0.5 : i / (samples.length - 1));
    const svg = draw("svg", { viewBox: `0 0 ${width} ${height}`, role: "img",
      "aria-label": `${samples.length} raw samples from ${digits(least)} to ${digits(most)} ${unit}` });
    if (t.lo !== null) svg.append(draw("rect", { class: "band", x: left, width: width - left - right, y: y(hi), height: Math.max(1, y(lo) - y(hi)) }));
    svg.append(draw("line", { class: "mid", x1: left, x2: width - right, y1: y(mid), y2: y(mid) }));
    for (const v of least === most ? [most] : [least, most]) {
      svg.append(draw("text", { x: left - 5, y: y(v) + 4, "text-anchor": "end" }, digits(v)));
    }
    samples.forEach((s, i) => {
      const dot = draw("circle", { cx: x(i), cy: y(s), r: samples.length > 60 ? 1.6 : 2.6, fill: colour(c.backend) });
      if (out.has(i)) dot.setAttribute("class", "out");
      dot.append(draw("title", {}, `sample ${i + 1}: ${digits(s)} ${unit}${out.has(i) ? ", left out: disturbed" : ""}`));
      svg.append(dot);
    });
    svg.append(draw("text", { x: left, y: height - 3 }, out.size ? "in the order taken; hollow: left out" : "in the order taken"));
    return svg;
  }
  function reveal(c) {
    const row = cellOf.get(c.i);
    toggle(row, true);
    row.scrollIntoView({ block: "center" });
    row.querySelector(".more").focus({ preventScroll: true });
  }

  // Charts: drawn at the width there is, again when that or the filter changes.
  const measured = () => shown().filter((c) => c.kind === "measured");
  const by = (list, key) => {
    const groups = new Map();
    for (const item of list) groups.set(key(item), [...(groups.get(key(item)) ?? []), item]);
    return groups;
  };
  function legend(list) {
    const box = make("div", { class: "legend" });
    for (const name of [...new Set(list.map((c) => c.backend))].sort()) {
      const item = make("span");
      item.append(make("i", { style: `--c:${colour(name)}` }), name);
      box.append(item);
    }
    return box;
  }
  const MOST_BARS = 60, CLASSES = ["f32", "f16", "bf16", "int8", "int5", "int4", "int3"];
  function bars() {
    const box = byId("bars"), metric = byId("bars-metric").value, grouping = byId("bars-group").value;
    const list = measured().filter((c) => c[metric]);
    box.replaceChildren();
    if (!list.length) return box.append(make("p", { class: "soft" }, `no cell shown here has a ${metric} speed`));
    const apart = grouping === "hardware" ? "" : " · ";
    for (const [what, alike] of by(list, (c) => `${apart && c.hardware + apart}${c.model} · prompt → decode ${c.workload}`)) {
      const top = Math.max(...alike.map((c) => c[metric].hi ?? c[metric].v));
      const kept = [...alike].sort((a, b) => b[metric].v - a[metric].v).slice(0, MOST_BARS);
      const rest = alike.length - kept.length;
      box.append(make("p", { class: "panel" }, what + (rest ? ` (the ${MOST_BARS} fastest; ${rest} more below: filter to see them)` : "")));
      const rank = (own) => grouping === "cls" ? CLASSES.indexOf(own[0].cls) >>> 0 : -own[0][metric].v;
      for (const [group, own] of [...by(kept, (c) => c[grouping] || "other")].sort((a, b) => rank(a[1]) - rank(b[1]))) {
        box.append(make("h3", {}, group));
        for (const c of own) box.append(bar(c, metric, top, alike));
      }
    }
    box.append(legend(list));
  }
  function bar(c, metric, top, list) {
    const { v, lo, hi } = c[metric];
    const line = make("button", { type: "button", class: "hbar", style: `--c:${colour(c.backend)}` });
    line.append(make("span", { class: "name" }, named(c, list)));
    const track = make("span", { class: "bar" });
    track.append(make("i", { style: `width:${100 * v / top}%` }));
    if (lo !== null) track.append(make("b", { style: `left:${100 * lo / top}%;width:${100 * (hi - lo) / top}%` }));
    line.append(track, make("span", { class: "val" }, `${digits(v)} tok/s`));
    line.title = lo === null ? "no interval" : `95 % interval ${digits(lo)} to ${digits(hi)} tok/s; click for the raw samples`;
    line.addEventListener("click", () => reveal(c));
    return line;
  }
  // A log-log frame; returns the drawing and its two scales.
  function frame(box, xs, ys, xName, yName, wide = 360) {
    const width = Math.max(300, box.clientWidth || 600), height = Math.min(wide, Math.max(260, width * 0.62));
    const left = 52, right = 14, top = 26, bottom = 40;
    const ends = (list) => [Math.floor(Math.log10(Math.min(...list)) - 0.05), Math.ceil(Math.log10(Math.max(...list)) + 0.05)];
    const [x0, x1] = ends(xs), [y0, y1] = ends(ys);
    const x = (v) => left + (width - left - right) * (Math.log10(v) - x0) / (x1 - x0);
    const y = (v) => height - bottom - (height - top - bottom) * (Math.log10(v) - y0) / (y1 - y0);
    const svg = draw("svg", { viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": `${yName} against ${xName}` });
    const step = (a, b) => Math.max(1, Math.ceil((b - a) / 6));
    for (let e = x0; e <= x1; e += step(x0, x1)) {
      svg.append(draw("line", { class: "gridline", x1: x(10 ** e), x2: x(10 ** e), y1: top, y2: height - bottom }));
      svg.append(draw("text", { x: x(10 ** e), y: height - bottom + 16, "text-anchor": "middle" }, power(10 ** e)));
    }
    for (let e = y0; e <= y1; e += step(y0, y1)) {
      svg.append(draw("line", { class: "gridline", x1: left, x2: width - right, y1: y(10 ** e), y2: y(10 ** e) }));
      svg.append(draw("text", { x: left - 6, y: y(10 ** e) + 4, "text-anchor": "end" }, power(10 ** e)));
    }
    svg.append(draw("path", { class: "axis", fill: "none", d: `M${left} ${top}V${height - bottom}H${width - right}` }));
    svg.append(draw("text", { x: width - right, y: height - 6, "text-anchor": "end", class: "strong" }, xName));
    svg.append(draw("text", { x: 4, y: 10, class: "strong" }, yName));
    box.append(svg);
    return { svg, x, y, x0, x1, y0, y1, width };
  }
  function mark(f, c, px, py, square, text) {
    const [x, y] = [f.x(px), f.y(py)];
    const node = square ? draw("rect", { x: x - 4, y: y - 4, width: 8, height: 8 }) : draw("circle", { cx: x, cy: y, r: 4.5 });
    node.setAttribute("fill", colour(c.backend));
    node.setAttribute("class", "mark");
    node.append(draw("title", {}, text));
    node.addEventListener("click", () => reveal(c));
    f.svg.append(node);
  }
  const middle = (list) => [...list].sort((a, b) => a - b)[Math.floor(list.length / 2)];
  function roofline() {
    const box = byId("roofline");
    const points = measured().flatMap((c) => c.points.map((p) => ({ c, ...p })));
    const without = measured().filter((c) => (c.prefill || c.decode) && !c.points.length).length;
    box.replaceChildren();
    if (!points.length) return box.append(make("p", { class: "soft" }, "no cell shown here says the bytes of weights that it reads"));
    const roofs = points.filter((p) => p.roof);
    const f = frame(box, points.map((p) => p.x), [...points.map((p) => p.y), ...roofs.map((p) => p.roof)].map((v) => v / 1e9),
      "operations per byte of weights", "Gop/s");
    const said = [];
    for (const [hardware, own] of by(roofs, (p) => p.c.hardware)) {
      const slopes = own.filter((p) => p.metric === "decode").map((p) => p.roof / p.x);
      const flats = own.filter((p) => p.metric === "prefill").map((p) => p.roof);
      const slope = slopes.length ? middle(slopes) : null, flat = flats.length ? Math.max(...flats) : Infinity;
      const path = [];
      for (let e = f.x0; e <= f.x1 + 1e-9; e += 0.02) {
        const v = Math.min(slope === null ? Infinity : slope * 10 ** e, flat) / 1e9;
        if (v >= 10 ** f.y0 && v <= 10 ** f.y1) path.push(`${f.x(10 ** e)} ${f.y(v)}`);
      }
      if (path.length) f.svg.append(draw("path", { class: "roof", d: "M" + path.join("L") }));
      said.push(`${hardware}: ${[slope && big(slope, "B/s"), flat < Infinity && big(flat, "op/s")].filter(Boolean).join(" and ")}`);
      const end = Math.min(slope === null ? Infinity : slope * 10 ** f.x1, flat) / 1e9;
      f.svg.append(draw("text", { x: f.width - 16, y: Math.max(36, f.y(Math.min(end, 10 ** f.y1)) - 5), "text-anchor": "end" }, hardware));
    }
    for (const p of points) {
      const share = p.fraction ? `, ${(100 * p.fraction).toFixed(0)} % of the roofline` : ", no roofline";
      mark(f, p.c, p.x, p.y / 1e9, p.metric === "prefill", `${label(p.c)} ${p.metric}: ${digits(p.y / 1e9)} Gop/s${share}`);
    }
    const notes = ["circles decode, squares prefill", ...said];
    if (!roofs.length) notes.push("no roof is drawn: no cell here has one (weights in the cache, or nothing probed; its details say why)");
    if (without) notes.push(`${without} cells are not drawn: the bytes of weights that they read are unknown`);
    box.append(make("p", { class: "soft" }, notes.join("; ")), legend(points.map((p) => p.c)));
  }
  const LEAST_KL = 1e-9;
  function frontier() {
    const box = byId("frontier");
    const list = measured().filter((c) => c.frontier);
    box.replaceChildren();
    if (!list.length) return box.append(make("p", { class: "soft" }, "no cell shown here has both a decode speed and a divergence; rwkv-bench quality measures it"));
    const kl = (c) => Math.max(c.frontier.kl, LEAST_KL);
    const f = frame(box, list.map((c) => c.frontier.speed), list.map(kl), "decode tok/s", "KL from the fp32 weights, nat/token (less is better)");
    for (const own of by(list, (c) => `${c.hardware} ${c.model} ${c.workload}`).values()) {
      const best = own.filter((c) => !own.some((d) => d !== c && d.frontier.speed >= c.frontier.speed && kl(d) <= kl(c)
        && (d.frontier.speed > c.frontier.speed || kl(d) < kl(c)))).sort((a, b) => a.frontier.speed - b.frontier.speed);
      f.svg.append(draw("path", { class: "front", d: "M" + best.map((c) => `${f.x(c.frontier.speed)} ${f.y(kl(c))}`).join("L") }));
    }
    for (const c of list) {
      mark(f, c, c.frontier.speed, kl(c), false, `${label(c)}: decode ${digits(c.frontier.speed)} tok/s, KL ${c.frontier.kl.toPrecision(2)} nat/token`);
    }
    box.append(make("p", { class: "soft" }, "dashed: nothing is both faster and closer; exact ones are drawn at 1e-9"), legend(list));
  }
  const MOST_HISTORIES = 24;
  function histories() {
    const box = byId("history"), metric = byId("history-metric").value;
    const list = measured().filter((c) => c.history[metric]);
    box.replaceChildren();
    if (!list.length) return box.append(make("p", { class: "soft" }, "no cell shown here was measured in two runs"));
    const grid = make("div", { class: "multi" });
    for (const c of list.slice(0, MOST_HISTORIES)) grid.append(past(c, c.history[metric], list));
    box.append(grid);
    if (list.length > MOST_HISTORIES) box.append(make("p", { class: "soft" }, `${list.length - MOST_HISTORIES} more: filter to see them`));
  }
  function past(c, points, list) {
    const card = make("div");
    card.append(make("b", {}, named(c, list)));
    const most = Math.max(...points.map((p) => p.hi ?? p.v)) * 1.05;
    const width = 250, height = 96, left = 12 + 7 * digits(most / 1.05).length, right = 8, top = 8, bottom = 18;
    const x = (i) => left + (width - left - right) * (i + 0.5) / points.length;
    const y = (v) => top + (height - top - bottom) * (1 - v / most);
    const svg = draw("svg", { viewBox: `0 0 ${width} ${height}`, role: "img",
      "aria-label": `${points.length} runs, ${digits(points[0].v)} to ${digits(points[points.length - 1].v)} tok/s` });
    for (const v of [0, most / 1.05]) {
      svg.append(draw("line", { class: "gridline", x1: left, x2: width - right, y1: y(v), y2: y(v) }));
      svg.append(draw("text", { x: left - 5, y: y(v) + 4, "text-anchor": "end" }, v ? digits(v) : "0"));
    }
    svg.append(draw("path", { class: "front", d: "M" + points.map((p, i) => `${x(i)} ${y(p.v)}`).join("L") }));
    points.forEach((p, i) => {
      if (p.changed) svg.append(draw("line", { class: "mid", x1: (x(i) + x(i - 1)) / 2, x2: (x(i) + x(i - 1)) / 2, y1: top, y2: height - bottom }));
      if (p.lo !== null) svg.append(draw("line", { stroke: colour(c.backend), x1: x(i), x2: x(i), y1: y(p.lo), y2: y(p.hi) }));
      const dot = draw("circle", { cx: x(i), cy: y(p.v), r: 3, fill: colour(c.backend) });
      dot.append(draw("title", {}, `${p.t ?? ""} ${p.rev ?? p.run ?? ""}: ${digits(p.v)} tok/s${p.changed ? `; the level changed here, to ${digits(100 * p.changed.ratio)} % of what it was (p ${p.changed.p.toPrecision(1)})` : ""}`));
      svg.append(dot);
    });
    const sameDay = (points[0].t ?? "").slice(0, 10) === (points[points.length - 1].t ?? "").slice(0, 10);
    const day = (p) => sameDay ? (p.t ?? "").slice(11, 16) : (p.t ?? "").slice(0, 10);
    svg.append(draw("text", { x: left, y: height - 4 }, day(points[0])));
    svg.append(draw("text", { x: width - right, y: height - 4, "text-anchor": "end" }, day(points[points.length - 1])));
    card.append(svg);
    return card;
  }
  function charts() {
    bars();
    roofline();
    frontier();
    histories();
  }
  for (const id of ["bars-metric", "bars-group", "history-metric"]) byId(id).addEventListener("change", charts);
  let last = innerWidth;
  addEventListener("resize", () => {
    if (innerWidth !== last) charts();
    last = innerWidth;
  });
  document.documentElement.classList.add("js");
  filter();
})();
