"use strict";
// report.html: what a run did.
main.replaceChildren(
  el("h1", {}, "Reconstruction report"),
  el("p", { class: "soft" }, data.closing),
  tiles(), ...notes(data.notes),
  el("h2", {}, "Images"), ...imageSection(),
  el("h2", {}, "Pairs"),
  el("p", { class: "soft small" }, "Point at an edge or a photo to see what was decided and why; click an edge to see its matches, a photo to see its pairs."),
  ...pairGraph(data),
  el("h2", {}, "Points"), modelSection(),
  el("h2", {}, "Run"), runSection(),
);
document.body.dataset.ready = "true";

function tiles() {
  const { counts } = data;
  const seconds = Object.values(data.timings_s).reduce((sum, s) => sum + s, 0);
  const tile = (value, text) => el("div", { class: "tile" }, el("b", {}, value), el("span", {}, text));
  return el("div", { class: "tiles" },
    tile(`${count(counts.registered)} / ${count(counts.images)}`, "images registered"),
    tile(count(counts.models), counts.models === 1 ? "model" : "models"),
    tile(count(counts.points), "points"),
    tile(`${count(counts.kept_pairs)} / ${count(counts.pairs)}`, "directed pairs kept"),
    tile(seconds < 100 ? `${seconds.toFixed(1)} s` : `${count(Math.round(seconds / 6) / 10)} min`, "in all stages"));
}

function imageSection() {
  const grid = el("div", { class: "cards" });
  const state = { picture: "photo", text: "", problems: false };
  const search = el("input", { type: "search", placeholder: "search names", oninput: () => { state.text = search.value; show(); } });
  const scale = el("span", { class: "soft small" });
  const low = data.images.filter((image) => image.model === null).length;
  function show() {
    const wanted = state.text.toLowerCase();
    const images = data.images.filter((image) =>
      image.name.toLowerCase().includes(wanted) && !(state.problems && image.model !== null));
    images.sort((a, b) => (a.model !== null) - (b.model !== null));
    grid.replaceChildren(...images.map((image) => card(image, state.picture)));
    scale.replaceChildren(...scaleOf(state.picture));
  }
  show();
  return [
    el("div", { class: "row" },
      choice(["photo", "depth", "confidence"], (name) => { state.picture = name; show(); }), search,
      low ? check(`only the ${count(low)} in no model`, false, (on) => { state.problems = on; show(); }) : null, scale),
    grid,
  ];
}

function scaleOf(picture) {
  if (picture === "photo") return [];
  const stops = "#23164a,#3e3f94,#267d9e,#2eb585,#aed447,#fdee80";
  const bar = el("span", { class: "scale", style: `background:linear-gradient(90deg,${stops})` });
  return picture === "depth" ? ["far", bar, "near, each photo on its own scale"] : ["unsure", bar, "sure, the same scale for all photos"];
}

function card(image, picture) {
  const source = image[picture];
  const out = image.model === null;
  const facts = out ? [image.reason] : [
    `${plural(image.observations, "observation")}` + (image.mean_error_px === null ? "" : `, ${image.mean_error_px} px off`),
    `focal ${count(image.focal_px)} px`, `${image.size[0]} × ${image.size[1]} pixels`,
    `confidence ${image.median_confidence}`, `depth ${image.near} to ${image.far}`,
  ];
  return el("div", { class: "card" },
    el("div", { class: "picture" }, source ? el("img", { src: source, alt: `${picture} of ${image.name}` }) : el("span", { class: "soft small" }, `no ${picture}`)),
    el("div", { class: "text" },
      el("div", { class: "name" }, image.name),
      el("span", { class: `badge ${out ? "bad" : "good"}` }, out ? "not registered" : data.counts.models > 1 ? `model ${image.model}` : "registered"),
      facts.map((fact) => el("div", { class: "soft" }, fact))));
}

function modelSection() {
  if (!data.models.length) return el("p", { class: "soft" }, "There is no model.");
  return el("div", { class: "columns" }, data.models.slice(0, 12).flatMap((model, i) => {
    const { lengths, errors, bins_px: edges, observations } = data.tracks[i];
    const range = (k) => k === edges.length ? `over ${edges[k - 1]} px` : `${k ? edges[k - 1] : 0} to ${edges[k]} px`;
    const more = lengths.filter(([n]) => n > 9).reduce((sum, [, c]) => sum + c, 0);
    const rows = [...lengths.filter(([n]) => n <= 9), ...(more ? [["10 or more", more]] : [])];
    return [
      el("div", { class: "panel" }, el("h3", {}, `Model ${i}: ${model.folder}`), table(["", ""], [
        ["images", count(model.images)], ["points", count(model.points)], ["observations", count(observations)],
        ...("mean_track_length" in model ? [["mean track length", model.mean_track_length]] : []),
        ...("mean_reprojection_error_px" in model ? [["mean reprojection error", `${model.mean_reprojection_error_px} px`]] : []),
      ], [1])),
      el("div", { class: "panel" }, el("h3", {}, "Images that see a point"), bars(rows.map(([n, c]) => [String(n), c, count(c)]))),
      el("div", { class: "panel" }, el("h3", {}, "Reprojection error of points, pixels of the stored photos"),
        bars(errors.map((c, k) => [range(k), c, count(c)]))),
    ];
  }));
}

function runSection() {
  const times = Object.entries(data.timings_s).map(([stage, s]) => [stage.replaceAll("_", " "), s, `${s.toFixed(s < 10 ? 2 : 1)} s`]);
  const chosen = (data.refinement.chosen || []).map((model) => ["refined by", `${model.origin}: ${plural(model.after.verified_images, "verified image")}`]);
  return el("div", { class: "columns" },
    el("div", { class: "panel" }, el("h3", {}, "Time by stage"), bars(times)),
    el("div", { class: "panel" }, el("h3", {}, "Made with"), table(["", ""], [
      ...(data.network ? [["network", data.network.name], ["its licence", data.network.licence]] : []),
      ...chosen, ...Object.entries(data.versions)])));
}
