"use strict";
// The pair graph: photos as nodes, pairs as edges with their decisions, and what is known of the chosen pair.
const SIDE = 1000;
const KINDS = {
  kept: { text: "kept", badge: "good", color: "--good" },
  half: { text: "kept one way", badge: "half", color: "--half" },
  dropped: { text: "dropped", badge: "bad", color: "--bad" },
};

function pairGraph(data) {
  const edges = readEdges(data.graph.edges);
  if (!edges.length) return [el("p", { class: "soft" }, "No pair was compared.")];
  const detail = el("div", { class: "panel" });
  const lines = el("div", { class: "pairs" });
  const shown = new Set(Object.keys(KINDS));
  let weakestFirst = false;
  const drawing = drawGraph(data, edges, choose);

  function choose(edge) {
    drawing.mark(edge);
    detail.replaceChildren(...pairDetail(data, edge));
  }
  function list() {
    const rows = edges.filter((edge) => shown.has(edge.kind)).sort((a, b) => b.score - a.score);
    if (weakestFirst) rows.reverse();
    lines.replaceChildren(pairTable(data, rows.slice(0, 400), choose));
  }
  const legend = Object.entries(KINDS).map(([kind, { text, color }]) => {
    const number = edges.filter((edge) => edge.kind === kind).length;
    const line = el("span", { class: "key", style: `border-color:var(${color})` });
    return check([line, `${text} (${count(number)})`], true, (on) => {
      if (on) shown.add(kind);
      else shown.delete(kind);
      drawing.show(shown);
      list();
    });
  });
  const order = choice(["strongest", "weakest"], (name) => { weakestFirst = name === "weakest"; list(); });
  list();
  choose(edges.find((edge) => data.matches[`${edge.i}-${edge.j}`]) || edges[0]);
  const box = el("div", { class: "panel", style: "margin-top:14px" },
    el("div", { class: "row" }, el("h3", { style: "margin:0" }, "Pairs by score"), order), lines);
  return [
    el("div", { class: "row" }, legend),
    el("div", { class: "graph" }, el("div", { class: "panel drawing" }, drawing.picture), el("div", {}, detail, box)),
  ];
}

function readEdges(rows) {
  return rows.map(([i, j, forth, back]) => {
    const ways = [forth, back].filter(Boolean);
    const kept = ways.filter((way) => way[0]).length;
    const kind = kept === 0 ? "dropped" : kept === ways.length ? "kept" : "half";
    return { i, j, forth, back, kind, score: Math.max(...ways.map((way) => way[1])) };
  });
}

function drawGraph({ images, graph }, edges, choose) {
  const half = Math.max(9, Math.min(46, 190 / Math.sqrt(images.length)));
  const reach = SIDE / 2 - half * 1.4 - 6;
  const places = graph.places.map(([x, y]) => [SIDE / 2 + x * reach, SIDE / 2 + y * reach]);
  const top = Math.max(...edges.map((edge) => Math.log(Math.max(edge.score, 1)))) || 1;
  let focus = null;
  for (const edge of edges) {
    const share = Math.log(Math.max(edge.score, 1)) / top;
    const [[x1, y1], [x2, y2]] = [places[edge.i], places[edge.j]];
    edge.line = svg("line", { x1, y1, x2, y2, class: `edge ${edge.kind}`,
      "stroke-width": edge.kind === "dropped" ? 1.6 : 1.2 + 5 * share,
      "stroke-opacity": edge.kind === "dropped" ? 0.45 : 0.25 + 0.6 * share });
    const touch = svg("line", { x1, y1, x2, y2, class: "touch" });
    edge.group = svg("g", { onclick: () => choose(edge), ...tip(() => edgeTip(images, edge)) }, edge.line, touch);
  }
  const nodes = images.map((image, i) => drawNode(image, places[i], half, tip(() => nodeTip(image, i, edges)), () => {
    focus = focus === i ? null : i;
    nodes.forEach((node, k) => node.classList.toggle("chosen", k === focus));
    edges.forEach((edge) => edge.line.classList.toggle("faded", focus !== null && edge.i !== focus && edge.j !== focus));
  }));
  // dropped ones below, strong ones on top
  const ordered = [...edges].sort((a, b) => (a.kind !== "dropped") - (b.kind !== "dropped") || a.score - b.score);
  const picture = svg("svg", { viewBox: `0 0 ${SIDE} ${SIDE}`, role: "img", "aria-label": "pair graph" },
    ordered.map((edge) => edge.group), nodes);
  return {
    picture,
    show: (kinds) => edges.forEach((edge) => edge.group.classList.toggle("hidden", !kinds.has(edge.kind))),
    mark: (chosen) => edges.forEach((edge) => edge.line.classList.toggle("chosen", edge === chosen)),
  };
}

function drawNode(image, [x, y], half, events, choose) {
  const [w, h] = image.aspect > 1 ? [half, half / image.aspect] : [half * image.aspect, half];
  const box = { x: x - w, y: y - h, width: 2 * w, height: 2 * h };
  const shapes = half < 11 ? [svg("circle", { cx: x, cy: y, r: half * 0.8 })]
    : [image.photo ? svg("image", { ...box, href: image.photo }) : svg("rect", { ...box, class: "blank" }),
      svg("rect", { ...box, rx: 3 })];
  return svg("g", { class: image.model === null ? "node out" : "node", onclick: choose, ...events }, shapes);
}

// What is told of a thing while the pointer is over it.
function tip(content) {
  const box = () => document.getElementById("tip") || document.body.appendChild(el("div", { id: "tip", class: "hidden" }));
  return {
    onmousemove: (event) => {
      box().replaceChildren(...content());
      box().classList.remove("hidden");
      const right = event.clientX + 16 + box().offsetWidth > window.innerWidth;
      box().style.left = `${right ? event.clientX - 16 - box().offsetWidth : event.clientX + 16}px`;
      box().style.top = `${Math.min(event.clientY + 14, window.innerHeight - box().offsetHeight - 8)}px`;
    },
    onmouseleave: () => box().classList.add("hidden"),
  };
}

function edgeTip(images, edge) {
  return [el("b", {}, `${images[edge.i].name} · ${images[edge.j].name}`), ...decisions(images, edge)];
}

function nodeTip(image, i, edges) {
  const mine = edges.filter((edge) => edge.i === i || edge.j === i);
  const kept = mine.filter((edge) => edge.kind !== "dropped").length;
  return [el("b", {}, image.name), el("div", {}, `${kept} of ${plural(mine.length, "pair")} kept`),
    el("div", {}, image.model === null ? image.reason : `in model ${image.model}`)];
}

// A line for each direction: who is the reference, what was decided and why.
function decisions(images, edge) {
  const ways = [[edge.i, edge.j, edge.forth], [edge.j, edge.i, edge.back]].filter((way) => way[2]);
  return ways.map(([a, b, [kept, , reason]]) =>
    el("div", {}, `${images[a].name} → ${images[b].name}: ${kept ? "kept" : "dropped"}, ${reason}`));
}

const badge = (kind) => el("span", { class: `badge ${KINDS[kind].badge}` }, KINDS[kind].text);

function pairTable({ images }, edges, choose) {
  const cells = (edge) => [
    el("td", {}, `${images[edge.i].name} · ${images[edge.j].name}`),
    el("td", {}, badge(edge.kind)),
    el("td", { class: "number" }, edge.score.toFixed(2)),
  ];
  return el("table", {}, el("tbody", {}, edges.map((edge) => el("tr", { onclick: () => choose(edge) }, cells(edge)))));
}

function pairDetail({ images, matches }, edge) {
  const found = matches[`${edge.i}-${edge.j}`];
  const text = found ? `${plural(found.count, "match")}`.replace("matchs", "matches") + `, ${found.drawn.length} drawn`
    : edge.kind === "dropped" ? "not matched, as it was dropped" : "its matches are not in this page";
  return [
    el("div", { class: "row", style: "margin-bottom:8px" },
      el("h3", { style: "margin:0" }, `${images[edge.i].name} · ${images[edge.j].name}`), badge(edge.kind)),
    overlay(images[edge.i], images[edge.j], found ? found.drawn : []),
    el("p", { class: "soft small", style: "margin-top:6px" }, text),
    el("div", { class: "small" }, decisions(images, edge)),
  ];
}

// Two photos side by side with lines between matching places, coloured by their height in the first photo.
function overlay(left, right, lines) {
  const height = 600 / (left.aspect + right.aspect);
  const [w0, w1, gap] = [height * left.aspect, height * right.aspect, 8];
  const photo = (image, x, width) => image.photo
    ? svg("image", { href: image.photo, x, y: 0, width, height, preserveAspectRatio: "none" })
    : svg("rect", { x, y: 0, width, height, fill: "var(--shade)" });
  const marks = lines.flatMap(([x0, y0, x1, y1]) => {
    const ends = { x1: (x0 / 1000) * w0, y1: (y0 / 1000) * height, x2: w0 + gap + (x1 / 1000) * w1, y2: (y1 / 1000) * height };
    const color = `hsl(${(y0 / 1000) * 300} 90% 55%)`;
    return [svg("line", { ...ends, stroke: color, "stroke-width": 1.1, "stroke-opacity": 0.85 }),
      svg("circle", { cx: ends.x1, cy: ends.y1, r: 2.2, fill: color }),
      svg("circle", { cx: ends.x2, cy: ends.y2, r: 2.2, fill: color })];
  });
  return svg("svg", { class: "overlay", viewBox: `0 0 ${600 + gap} ${height}` },
    photo(left, 0, w0), photo(right, w0 + gap, w1), marks);
}
