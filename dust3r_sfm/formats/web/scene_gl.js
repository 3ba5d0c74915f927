"use strict";
// What is drawn by WebGL: a cloud shaded by its depth (eye-dome lighting), photos of cameras, lines of even width.
const SHADERS = {
  points: [`#version 300 es
    uniform mat4 clip_from_world; uniform vec3 origin; uniform float span, size, height; uniform int mode, only;
    in vec3 position; in vec3 color; in float certainty; in float image, spacing; out vec3 shade;
    vec3 ramp(float x) {
      vec3 stops[6] = vec3[6](vec3(.137,.086,.29), vec3(.243,.247,.58), vec3(.149,.49,.62), vec3(.18,.71,.522),
        vec3(.682,.831,.278), vec3(.992,.933,.502));
      float place = clamp(x, 0., 1.) * 5.; int low = min(int(place), 4);
      return mix(stops[low], stops[low + 1], place - float(low));
    }
    vec3 wheel(float i) { return .55 + .4 * cos(6.2832 * (fract(i * .61803) + vec3(0., .33, .67))); }
    void main() {
      gl_Position = clip_from_world * vec4(origin + span * position, 1.);
      gl_PointSize = clamp(size * exp2(8. * spacing) * height / gl_Position.w, 1.5, 32.);
      if (only >= 0 && int(image + .5) != only) gl_Position = vec4(2., 2., 2., 1.);
      shade = mode == 0 ? color : mode == 1 ? ramp(certainty) : wheel(image);
    }`, `#version 300 es
    precision highp float; in vec3 shade; out vec4 result;
    void main() { vec2 d = gl_PointCoord - .5; if (dot(d, d) > .25) discard; result = vec4(shade, 1.); }`],
  eyedome: [`#version 300 es
    void main() { gl_Position = vec4(vec2(gl_VertexID & 1, gl_VertexID >> 1) * 4. - 1., 0., 1.); }`, `#version 300 es
    precision highp float; uniform sampler2D colors, depths; uniform float near, far, strength; out vec4 result;
    float logDepth(ivec2 p) {
      float d = texelFetch(depths, clamp(p, ivec2(0), textureSize(depths, 0) - 1), 0).r;
      return log2(2. * near * far / (far + near - (2. * d - 1.) * (far - near)));
    }
    void main() {
      ivec2 p = ivec2(gl_FragCoord.xy); float depth = texelFetch(depths, p, 0).r, here = logDepth(p), sum = 0.;
      gl_FragDepth = depth;
      vec2 q = gl_FragCoord.xy / vec2(textureSize(depths, 0)) - vec2(.5, .62);
      if (depth == 1.) { result = vec4(mix(vec3(.16, .18, .22), vec3(.07, .08, .1), clamp(length(q) * 1.35, 0., 1.)), 1.); return; }
      for (int i = 0; i < 8; i++) {
        float a = float(i) * .7854; ivec2 step = ivec2(round(vec2(cos(a), sin(a)) * 1.6));
        sum += clamp(here - logDepth(p + step), 0., .4);
      }
      result = vec4(texelFetch(colors, p, 0).rgb * exp(-strength * sum / 8.), 1.);
    }`],
  lines: [`#version 300 es
    uniform mat4 clip_from_world; uniform vec2 pixels; uniform float width;
    in vec3 from, to; in vec4 color; out vec4 shade;
    void main() {
      vec4 a = clip_from_world * vec4(from, 1.), b = clip_from_world * vec4(to, 1.); shade = color;
      float least = 1e-4; // what lies behind the eye is cut off
      if (a.w < least) a = mix(a, b, (least - a.w) / (b.w - a.w)); else if (b.w < least) b = mix(b, a, (least - b.w) / (a.w - b.w));
      vec2 along = (b.xy / b.w - a.xy / a.w) * pixels; vec2 side = vec2(-along.y, along.x) / max(length(along), 1e-6);
      vec4 end = (gl_VertexID & 1) == 0 ? a : b;
      end.xy += side * (gl_VertexID < 2 ? 1. : -1.) * width / pixels * end.w; gl_Position = end;
    }`, `#version 300 es
    precision highp float; in vec4 shade; out vec4 result; void main() { result = shade; }`],
  photos: [`#version 300 es
    uniform mat4 clip_from_world; uniform vec3 corners[4]; out vec2 place;
    void main() {
      place = vec2(gl_VertexID & 1, gl_VertexID >> 1);
      gl_Position = clip_from_world * vec4(corners[gl_VertexID], 1.);
    }`, `#version 300 es
    precision highp float; in vec2 place; uniform sampler2D photo; uniform float alpha; out vec4 result;
    void main() { result = vec4(texture(photo, place).rgb, alpha); }`],
};

function compile(gl, [vertex, fragment]) {
  const program = gl.createProgram();
  for (const [kind, source] of [[gl.VERTEX_SHADER, vertex], [gl.FRAGMENT_SHADER, fragment]]) {
    const shader = gl.createShader(kind);
    gl.shaderSource(shader, source);
    gl.compileShader(shader);
    if (!gl.getShaderParameter(shader, gl.COMPILE_STATUS)) throw new Error(gl.getShaderInfoLog(shader));
    gl.attachShader(program, shader);
  }
  gl.linkProgram(program);
  if (!gl.getProgramParameter(program, gl.LINK_STATUS)) throw new Error(gl.getProgramInfoLog(program));
  const uniforms = new Map();
  const at = (name) => {
    if (!uniforms.has(name)) uniforms.set(name, gl.getUniformLocation(program, name));
    return uniforms.get(name);
  };
  return { program, at, attribute: (name) => gl.getAttribLocation(program, name) };
}

function renderer(canvas) {
  const gl = canvas.getContext("webgl2", { antialias: true });
  if (!gl) return null;
  const programs = Object.fromEntries(Object.entries(SHADERS).map(([name, sources]) => [name, compile(gl, sources)]));
  const target = { frame: gl.createFramebuffer(), color: null, depth: null, width: 0, height: 0 };
  const empty = gl.createVertexArray();
  return { gl, programs, target, empty };
}

function bytesOf(text) {
  const binary = atob(text);
  const bytes = new Uint8Array(binary.length);
  for (let i = 0; i < binary.length; i++) bytes[i] = binary.charCodeAt(i);
  return bytes;
}

function uploadPoints({ gl, programs }, points) {
  const vao = gl.createVertexArray();
  gl.bindVertexArray(vao);
  const column = (name, text, size, type, normalized) => {
    gl.bindBuffer(gl.ARRAY_BUFFER, gl.createBuffer());
    gl.bufferData(gl.ARRAY_BUFFER, bytesOf(text), gl.STATIC_DRAW);
    const place = programs.points.attribute(name);
    gl.enableVertexAttribArray(place);
    gl.vertexAttribPointer(place, size, type, normalized, 0, 0);
  };
  column("position", points.positions, 3, gl.UNSIGNED_SHORT, false);
  column("color", points.colors, 3, gl.UNSIGNED_BYTE, true);
  column("certainty", points.certainty, 1, gl.UNSIGNED_BYTE, true);
  column("image", points.images, 1, gl.UNSIGNED_SHORT, false);
  column("spacing", points.spacing, 1, gl.UNSIGNED_BYTE, true);
  gl.bindVertexArray(null);
  return vao;
}

// Segments as [from, to, [r, g, b, a]].
function uploadLines({ gl, programs }, segments) {
  const values = new Float32Array(segments.flatMap(([from, to, color]) => [...from, ...to, ...color]));
  const vao = gl.createVertexArray();
  gl.bindVertexArray(vao);
  gl.bindBuffer(gl.ARRAY_BUFFER, gl.createBuffer());
  gl.bufferData(gl.ARRAY_BUFFER, values, gl.DYNAMIC_DRAW);
  for (const [name, size, offset] of [["from", 3, 0], ["to", 3, 12], ["color", 4, 24]]) {
    const place = programs.lines.attribute(name);
    gl.enableVertexAttribArray(place);
    gl.vertexAttribPointer(place, size, gl.FLOAT, false, 40, offset);
    gl.vertexAttribDivisor(place, 1);
  }
  gl.bindVertexArray(null);
  return { vao, count: segments.length };
}

function uploadPhoto({ gl }, source, done) {
  const image = new Image();
  const photo = { texture: null };
  image.onload = () => {
    photo.texture = gl.createTexture();
    gl.bindTexture(gl.TEXTURE_2D, photo.texture);
    gl.texImage2D(gl.TEXTURE_2D, 0, gl.RGB8, gl.RGB, gl.UNSIGNED_BYTE, image);
    gl.generateMipmap(gl.TEXTURE_2D);
    gl.texParameteri(gl.TEXTURE_2D, gl.TEXTURE_MIN_FILTER, gl.LINEAR_MIPMAP_LINEAR);
    gl.texParameteri(gl.TEXTURE_2D, gl.TEXTURE_WRAP_S, gl.CLAMP_TO_EDGE);
    gl.texParameteri(gl.TEXTURE_2D, gl.TEXTURE_WRAP_T, gl.CLAMP_TO_EDGE);
    done();
  };
  image.src = source;
  return photo;
}

function resize({ gl, target }) {
  const [width, height] = [gl.canvas.width, gl.canvas.height];
  if (target.width === width && target.height === height) return;
  Object.assign(target, { width, height });
  const texture = (format, layout, type) => {
    const made = gl.createTexture();
    gl.bindTexture(gl.TEXTURE_2D, made);
    gl.texImage2D(gl.TEXTURE_2D, 0, format, width, height, 0, layout, type, null);
    gl.texParameteri(gl.TEXTURE_2D, gl.TEXTURE_MIN_FILTER, gl.NEAREST);
    gl.texParameteri(gl.TEXTURE_2D, gl.TEXTURE_MAG_FILTER, gl.NEAREST);
    return made;
  };
  gl.deleteTexture(target.color);
  gl.deleteTexture(target.depth);
  target.color = texture(gl.RGBA8, gl.RGBA, gl.UNSIGNED_BYTE);
  target.depth = texture(gl.DEPTH_COMPONENT24, gl.DEPTH_COMPONENT, gl.UNSIGNED_INT);
  gl.bindFramebuffer(gl.FRAMEBUFFER, target.frame);
  gl.framebufferTexture2D(gl.FRAMEBUFFER, gl.COLOR_ATTACHMENT0, gl.TEXTURE_2D, target.color, 0);
  gl.framebufferTexture2D(gl.FRAMEBUFFER, gl.DEPTH_ATTACHMENT, gl.TEXTURE_2D, target.depth, 0);
}

// One frame: the cloud beside the screen, then shaded onto it, then photos and lines over it.
function drawFrame(made, view, cloud, photos, lines) {
  const { gl, programs, target, empty } = made;
  resize(made);
  gl.viewport(0, 0, target.width, target.height);
  gl.bindFramebuffer(gl.FRAMEBUFFER, target.frame);
  gl.enable(gl.DEPTH_TEST);
  gl.depthFunc(gl.LESS);
  gl.disable(gl.BLEND);
  gl.clearColor(0, 0, 0, 1);
  gl.clear(gl.COLOR_BUFFER_BIT | gl.DEPTH_BUFFER_BIT);
  const use = (name) => { gl.useProgram(programs[name].program); return programs[name].at; };
  let at = use("points");
  gl.uniformMatrix4fv(at("clip_from_world"), false, view.clip_from_world);
  gl.uniform3fv(at("origin"), cloud.origin);
  gl.uniform1f(at("span"), cloud.step);
  gl.uniform1f(at("size"), cloud.size);
  gl.uniform1f(at("height"), target.height);
  gl.uniform1i(at("mode"), cloud.mode);
  gl.uniform1i(at("only"), cloud.only);
  gl.bindVertexArray(cloud.vao);
  gl.drawArrays(gl.POINTS, 0, cloud.shown);

  gl.bindFramebuffer(gl.FRAMEBUFFER, null);
  gl.clear(gl.COLOR_BUFFER_BIT | gl.DEPTH_BUFFER_BIT);
  gl.depthFunc(gl.ALWAYS);
  at = use("eyedome");
  gl.bindVertexArray(empty);
  gl.activeTexture(gl.TEXTURE1);
  gl.bindTexture(gl.TEXTURE_2D, target.depth);
  gl.activeTexture(gl.TEXTURE0);
  gl.bindTexture(gl.TEXTURE_2D, target.color);
  gl.uniform1i(at("depths"), 1);
  gl.uniform1f(at("near"), view.near);
  gl.uniform1f(at("far"), view.far);
  gl.uniform1f(at("strength"), cloud.relief);
  gl.drawArrays(gl.TRIANGLES, 0, 3);
  gl.depthFunc(gl.LEQUAL);
  gl.enable(gl.BLEND);
  gl.blendFunc(gl.SRC_ALPHA, gl.ONE_MINUS_SRC_ALPHA);
  drawPhotos(gl, use("photos"), view, photos);
  at = use("lines");
  gl.uniformMatrix4fv(at("clip_from_world"), false, view.clip_from_world);
  gl.uniform2f(at("pixels"), target.width, target.height);
  for (const { vao, count, width } of lines) {
    gl.uniform1f(at("width"), width * view.scale);
    gl.bindVertexArray(vao);
    gl.drawArraysInstanced(gl.TRIANGLE_STRIP, 0, 4, count);
  }
  gl.bindVertexArray(null);
}

function drawPhotos(gl, at, view, photos) {
  gl.uniformMatrix4fv(at("clip_from_world"), false, view.clip_from_world);
  for (const { texture, corners, alpha } of photos) {
    gl.bindTexture(gl.TEXTURE_2D, texture);
    gl.uniform3fv(at("corners"), corners);
    gl.uniform1f(at("alpha"), alpha);
    gl.drawArrays(gl.TRIANGLE_STRIP, 0, 4);
  }
}
