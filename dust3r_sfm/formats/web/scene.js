"use strict";
// scene.html: walk around in a scene. Drag turns, right drag or two fingers shift, the wheel comes nearer.
const FIELD = 50 * Math.PI / 180;
const COVER = 1.5; // diameter of a point over the distance of its neighbours
const MODES = { photo: 0, confidence: 1, image: 2 };
const sub = (a, b) => a.map((x, i) => x - b[i]);
const add = (a, b, s = 1) => a.map((x, i) => x + s * b[i]);
const dot = (a, b) => a.reduce((sum, x, i) => sum + x * b[i], 0);
const norm = (a) => Math.hypot(...a);
const unit = (a) => { const n = norm(a) || 1; return a.map((x) => x / n); };
const cross = (a, b) => [a[1] * b[2] - a[2] * b[1], a[2] * b[0] - a[0] * b[2], a[0] * b[1] - a[1] * b[0]];
const toWorld = (camera, [x, y, z]) => {
  const m = camera.world_from_cam;
  return [0, 4, 8].map((r) => m[r] * x + m[r + 1] * y + m[r + 2] * z + m[r + 3]);
};

document.body.classList.add("viewer");
const canvas = el("canvas");
const made = renderer(canvas);
if (!made) main.replaceChildren(el("p", { class: "note" }, "This browser has no WebGL 2, which draws the scene."));
else main.replaceChildren(canvas);

const state = { mode: "photo", share: 0.7, size: 1, cameraSize: 1, cameras: true, photos: true, kept: false, dropped: false,
  onlyChosen: false, chosen: null, picture: "photo" };
const orbit = { target: [0, 0, 0], back: [0, 0, -1], distance: 1, up: [0, -1, 0] };
const settings = el("div", { class: "settings" });
const details = el("div", { class: "details hidden" });
let scene = null;
let waiting = false;
if (made) {
  main.append(settings, details);
  listen();
  open(0);
  render();
  const fault = made.gl.getError();
  if (fault) throw new Error(`WebGL says ${fault}`);
  document.body.dataset.ready = "true";
}

function open(index) {
  if (scene) made.gl.deleteVertexArray(scene.vao);
  const content = data.scenes[index];
  scene = { ...content, index, vao: uploadPoints(made, content.points) };
  scene.textures = content.cameras.map((camera) => camera.photo ? uploadPhoto(made, camera.photo, draw) : null);
  Object.assign(state, { chosen: null, onlyChosen: false });
  home();
  showSettings();
  showDetails();
  layCameras();
}

function home() {
  const { target, eye, up } = scene.look;
  Object.assign(orbit, { target: [...target], back: unit(sub(eye, target)), distance: norm(sub(eye, target)), up: unit(up) });
  draw();
}

function goTo(camera) {
  const eye = toWorld(camera, [0, 0, 0]);
  const forward = unit(sub(toWorld(camera, [0, 0, 1]), eye));
  const distance = Math.max(dot(sub(scene.look.target, eye), forward), 0.3 * scene.look.camera, 0.05 * orbit.distance);
  Object.assign(orbit, { target: add(eye, forward, distance), back: forward.map((x) => -x), distance });
  draw();
}

function showSettings() {
  const { points, cameras, edges } = scene;
  const level = el("span");
  const tellLevel = () => {
    const value = points.levels[Math.round(100 * state.share)];
    level.textContent = `${Math.round(100 * state.share)} %` + (value === undefined ? "" : `, confidence over ${value.toFixed(2)}`);
  };
  tellLevel();
  const kept = edges.filter((edge) => edge[2]).length;
  const box = (key, text) => check(text, state[key], (on) => { state[key] = on; layCameras(); });
  const colors = choice(Object.keys(MODES), (name) => { state.mode = name; draw(); });
  colors.querySelectorAll("button").forEach((button) => button.classList.toggle("on", button.textContent === state.mode));
  const which = data.scenes.length < 2 ? [] : [el("select", { onchange: (event) => open(Number(event.target.value)) },
    data.scenes.map((one, i) => el("option", { value: i, ...(i === scene.index ? { selected: "" } : {}) }, `model ${i}: ${plural(one.cameras.length, "image")}`)))];
  settings.replaceChildren(
    el("div", { class: "row between" }, el("b", {}, "Scene"), el("button", { type: "button", onclick: home }, "reset view")),
    el("div", { class: "soft small" }, `${plural(cameras.length, "camera")}, ${plural(points.count, "point")}`), ...which,
    el("h3", {}, "Colour"), colors,
    el("h3", {}, "Most confident points"), range(0.02, 1, 0.01, state.share, (value) => { state.share = value; tellLevel(); draw(); }),
    el("div", { class: "soft small" }, level),
    el("h3", {}, "Size of points"), range(0.3, 4, 0.1, state.size, (value) => { state.size = value; draw(); }),
    el("h3", {}, "Size of cameras"), range(0.2, 4, 0.1, state.cameraSize, (value) => { state.cameraSize = value; layCameras(); }),
    box("cameras", "cameras"), box("photos", "photos"),
    ...(edges.length ? [box("kept", `pairs kept (${count(kept)})`), box("dropped", `pairs dropped (${count(edges.length - kept)})`)] : []),
    el("h3", {}, "Images"),
    el("div", { class: "strip" }, cameras.map((camera, i) => el("button", { type: "button", title: camera.name, onclick: () => choose(i) },
      camera.photo ? el("img", { src: camera.photo, alt: camera.name }) : camera.name))));
}

function range(min, max, step, value, act) {
  const input = el("input", { type: "range", min, max, step, value, oninput: () => act(Number(input.value)) });
  return input;
}

function choose(index) {
  state.chosen = state.chosen === index ? null : index;
  if (state.chosen === null) state.onlyChosen = false;
  [...settings.querySelectorAll(".strip button")].forEach((button, i) => button.classList.toggle("on", i === state.chosen));
  showDetails();
  layCameras();
}

function showDetails() {
  details.classList.toggle("hidden", state.chosen === null);
  if (state.chosen === null) return;
  const camera = scene.cameras[state.chosen];
  const picture = el("img", { src: camera[state.picture] || "", alt: state.picture });
  const pictures = ["photo", "depth", "confidence"];
  const pick = choice(pictures, (name) => { state.picture = name; picture.src = camera[name]; picture.alt = name; });
  pick.querySelectorAll("button").forEach((button) => button.classList.toggle("on", button.textContent === state.picture));
  details.replaceChildren(
    el("div", { class: "row between" }, el("b", {}, camera.name), el("button", { type: "button", onclick: () => choose(state.chosen) }, "close")),
    ...(camera.photo ? [picture, pick] : [el("div", { class: "soft small" }, "its pictures are not in this page")]),
    el("div", { class: "row" }, el("button", { type: "button", onclick: () => goTo(camera) }, "look from here"),
      check("only its points", state.onlyChosen, (on) => { state.onlyChosen = on; draw(); })));
}

// Corners of a camera's photo in the world: left top, right top, left bottom, right bottom.
function cornersOf(camera) {
  const [fx, fy, cx, cy] = camera.K;
  const z = scene.look.camera * state.cameraSize;
  return [[0, 0], [1, 0], [0, 1], [1, 1]].map(([x, y]) => toWorld(camera, [((x - cx) / fx) * z, ((y - cy) / fy) * z, z]));
}

// Wires and photos of cameras and the lines of pairs, after their size or choice has changed.
function layCameras() {
  const centers = scene.cameras.map((camera) => toWorld(camera, [0, 0, 0]));
  scene.corners = scene.cameras.map(cornersOf);
  const wires = scene.cameras.flatMap((camera, i) => {
    const color = i === state.chosen ? [1, 0.76, 0.2, 1] : [0.92, 0.95, 1, 0.85];
    const [a, b, c, d] = scene.corners[i];
    return [[a, b], [b, d], [d, c], [c, a], ...[a, b, c, d].map((corner) => [centers[i], corner])].map(([from, to]) => [from, to, color]);
  });
  const pairs = scene.edges.filter((edge) => edge[2] ? state.kept : state.dropped)
    .map(([i, j, kept]) => [centers[i], centers[j], kept ? [0.27, 0.77, 0.55, 0.4] : [0.94, 0.4, 0.4, 0.3]]);
  const chosen = state.chosen === null ? [] : wires.slice(8 * state.chosen, 8 * state.chosen + 8);
  (scene.lines || []).forEach((one) => made.gl.deleteVertexArray(one.vao));
  scene.lines = [
    { ...uploadLines(made, pairs), width: 1.1 },
    { ...uploadLines(made, state.cameras ? wires : chosen), width: 1.2 },
    { ...uploadLines(made, chosen), width: 2.4 },
  ];
  draw();
}

function basis() {
  const right = unit(cross(orbit.back.map((x) => -x), orbit.up));
  return { right, above: cross(right, orbit.back.map((x) => -x)), eye: add(orbit.target, orbit.back, orbit.distance) };
}

function viewOf() {
  const { right, above, eye } = basis();
  const span = scene.points.step * 65535;
  const near = orbit.distance * 0.01;
  const far = orbit.distance + norm(sub(orbit.target, scene.look.target)) + 3 * span;
  const f = 1 / Math.tan(FIELD / 2);
  const rows = [right.map((x) => (x * f * canvas.height) / canvas.width), above.map((x) => x * f),
    orbit.back.map((x) => (-x * (far + near)) / (far - near)), orbit.back.map((x) => -x)];
  const last = rows.map((row) => -dot(row, eye));
  last[2] -= (2 * far * near) / (far - near);
  const columns = [0, 1, 2].flatMap((k) => rows.map((row) => row[k]));
  return { clip_from_world: new Float32Array([...columns, ...last]), near, far, scale: window.devicePixelRatio || 1, f };
}

function draw() {
  if (waiting) return;
  waiting = true;
  requestAnimationFrame(() => { waiting = false; render(); });
}

function render() {
  const scale = window.devicePixelRatio || 1;
  canvas.width = Math.max(1, Math.round(canvas.clientWidth * scale));
  canvas.height = Math.max(1, Math.round(canvas.clientHeight * scale));
  const view = viewOf();
  const { points } = scene;
  const cloud = {
    vao: scene.vao, origin: points.origin, step: points.step, shown: Math.round(points.count * state.share),
    size: (COVER * state.size * view.f * points.finest) / 2, mode: MODES[state.mode], only: state.onlyChosen ? state.chosen : -1, relief: 2.2,
  };
  const { eye } = basis();
  const isEye = (camera) => norm(sub(toWorld(camera, [0, 0, 0]), eye)) < 0.2 * scene.look.camera; // its photo would hide all
  const isShown = (i) => (i === state.chosen || (state.cameras && state.photos)) && !isEye(scene.cameras[i]);
  const photos = scene.textures.flatMap((photo, i) => photo && photo.texture && isShown(i)
    ? [{ texture: photo.texture, corners: scene.corners[i].flat(), alpha: i === state.chosen ? 1 : 0.85 }] : []);
  drawFrame(made, view, cloud, photos, scene.lines);
}

function turn(dx, dy) {
  const rotate = (v, axis, angle) => add(add(v.map((x) => x * Math.cos(angle)), cross(axis, v), Math.sin(angle)), axis, dot(axis, v) * (1 - Math.cos(angle)));
  orbit.back = unit(rotate(orbit.back, orbit.up, -dx * 0.006));
  const slope = Math.acos(Math.max(-1, Math.min(1, dot(orbit.back, orbit.up))));
  const wanted = Math.max(0.05, Math.min(Math.PI - 0.05, slope - dy * 0.006));
  orbit.back = unit(rotate(orbit.back, unit(cross(orbit.up, orbit.back)), wanted - slope));
  draw();
}

function shift(dx, dy) {
  const { right, above } = basis();
  const step = (2 * orbit.distance * Math.tan(FIELD / 2)) / canvas.clientHeight;
  orbit.target = add(add(orbit.target, right, -dx * step), above, dy * step);
  draw();
}

function zoom(factor) {
  orbit.distance *= factor;
  draw();
}

// The camera whose photo is under a place of the screen, the nearest of several.
function cameraAt(x, y) {
  if (!state.cameras) return null;
  const m = viewOf().clip_from_world;
  let best = null;
  scene.corners.forEach((corners, i) => {
    const seen = [0, 1, 3, 2].map((k) => {
      const [px, py, , w] = [0, 1, 2, 3].map((r) => m[r] * corners[k][0] + m[4 + r] * corners[k][1] + m[8 + r] * corners[k][2] + m[12 + r]);
      return [(px / w + 1) * canvas.clientWidth / 2, (1 - py / w) * canvas.clientHeight / 2, w];
    });
    const signs = seen.map(([ax, ay], k) => {
      const [bx, by] = seen[(k + 1) % 4];
      return Math.sign((bx - ax) * (y - ay) - (by - ay) * (x - ax));
    });
    if (seen.every((corner) => corner[2] > 0) && Math.abs(signs.reduce((a, b) => a + b)) === 4 && (!best || seen[0][2] < best[1])) best = [i, seen[0][2]];
  });
  return best && best[0];
}

function listen() {
  const pointers = new Map();
  let moved = 0;
  canvas.addEventListener("contextmenu", (event) => event.preventDefault());
  canvas.addEventListener("wheel", (event) => { event.preventDefault(); zoom(Math.exp(Math.sign(event.deltaY) * Math.min(Math.abs(event.deltaY), 100) * 0.0015)); }, { passive: false });
  canvas.addEventListener("pointerdown", (event) => {
    if (event.isTrusted) canvas.setPointerCapture(event.pointerId);
    pointers.set(event.pointerId, [event.clientX, event.clientY]);
    moved = pointers.size > 1 ? 99 : 0;
  });
  canvas.addEventListener("pointermove", (event) => {
    const before = pointers.get(event.pointerId);
    if (!before) return;
    const [dx, dy] = [event.clientX - before[0], event.clientY - before[1]];
    moved += Math.abs(dx) + Math.abs(dy);
    if (pointers.size === 2) {
      const other = [...pointers].find(([id]) => id !== event.pointerId)[1];
      zoom(norm(sub(before, other)) / Math.max(norm(sub([event.clientX, event.clientY], other)), 1));
      shift(dx / 2, dy / 2);
    } else if (event.buttons & 2 || event.shiftKey) shift(dx, dy);
    else turn(dx, dy);
    pointers.set(event.pointerId, [event.clientX, event.clientY]);
  });
  for (const kind of ["pointerup", "pointercancel"]) canvas.addEventListener(kind, (event) => {
    pointers.delete(event.pointerId);
    const found = kind === "pointerup" && moved < 5 ? cameraAt(event.offsetX, event.offsetY) : null;
    if (found !== null) choose(found);
  });
  window.addEventListener("resize", draw);
}
