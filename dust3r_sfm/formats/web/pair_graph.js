"use strict";
// pair_graph.html: the graph alone.
main.replaceChildren(
  el("h1", {}, "Pair graph"),
  el("p", { class: "soft" }, `${count(data.counts.kept_pairs)} of ${count(data.counts.pairs)} directed pairs of ` +
    `${plural(data.counts.images, "image")} were kept. Point at an edge or a photo to see what was decided and why; click an edge to see its matches, a photo to see its pairs.`),
  ...notes(data.notes),
  ...pairGraph(data),
);
document.body.dataset.ready = "true";
