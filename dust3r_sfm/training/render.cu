// Ray caster of procedural scenes: one thread a pixel, one source for the GPU and, for its test, the CPU.
// The arrays' layout and the meaning of every number are those of render.py, which computes the same in PyTorch.
#include <cmath>
#include <cstdint>

#ifdef __CUDACC__
#define DEVICE __device__ __forceinline__
#else
#define DEVICE static inline
static inline float rsqrtf(float x) { return 1.0f / sqrtf(x); }
#endif

namespace {

constexpr int PRIM = 60, LIGHT = 36, CAMERA = 16;
constexpr int NONE = 0, BOX = 1, ELLIPSOID = 2, CYLINDER = 3, RELIEF = 4, ROOM = 5;
constexpr int LEVELS = 6, SIDE = 256, MAX_PRIMS = 128;
constexpr int MARCH = 48, SHADOW_MARCH = 16, BISECT = 6;
constexpr float FAR = 1e8f, EPS = 1e-4f, STEP = 2e-3f;

struct V { float x, y, z; };
DEVICE V operator+(V a, V b) { return {a.x + b.x, a.y + b.y, a.z + b.z}; }
DEVICE V operator-(V a, V b) { return {a.x - b.x, a.y - b.y, a.z - b.z}; }
DEVICE V operator*(V a, float s) { return {a.x * s, a.y * s, a.z * s}; }
DEVICE V operator*(V a, V b) { return {a.x * b.x, a.y * b.y, a.z * b.z}; }
DEVICE float dot(V a, V b) { return a.x * b.x + a.y * b.y + a.z * b.z; }
DEVICE V unit(V a) { return a * rsqrtf(fmaxf(dot(a, a), 1e-20f)); }
DEVICE V load(const float* p) { return {p[0], p[1], p[2]}; }
DEVICE V mix(V a, V b, float w) { return a + (b - a) * w; }
DEVICE V transform(const float* m, V p) {
  return {m[0] * p.x + m[1] * p.y + m[2] * p.z + m[3], m[4] * p.x + m[5] * p.y + m[6] * p.z + m[7],
          m[8] * p.x + m[9] * p.y + m[10] * p.z + m[11]};
}
DEVICE V rotate(const float* m, V d) {
  return {m[0] * d.x + m[1] * d.y + m[2] * d.z, m[4] * d.x + m[5] * d.y + m[6] * d.z,
          m[8] * d.x + m[9] * d.y + m[10] * d.z};
}

struct Span { float t0, t1; V n0, n1; };  // the ray is inside for t0 < t < t1; normals are the object's

DEVICE void slab(Span& s, float o, float d, V axis) {  // -1 <= o + t d <= 1
  if (fabsf(d) < 1e-9f) { if (fabsf(o) > 1.0f) s.t1 = -FAR; return; }
  float inv = 1.0f / d, a = (-1.0f - o) * inv, b = (1.0f - o) * inv, sign = d > 0.0f ? -1.0f : 1.0f;
  float lo = fminf(a, b), hi = fmaxf(a, b);
  if (lo > s.t0) { s.t0 = lo; s.n0 = axis * sign; }
  if (hi < s.t1) { s.t1 = hi; s.n1 = axis * -sign; }
}

DEVICE void half_space(Span& s, V o, V d, V n, float offset) {  // n . x <= offset
  float rate = dot(n, d), gap = offset - dot(n, o);
  if (fabsf(rate) < 1e-9f) { if (gap < 0.0f) s.t1 = -FAR; return; }
  float t = gap / rate;
  if (rate > 0.0f) { if (t < s.t1) { s.t1 = t; s.n1 = n; } }
  else if (t > s.t0) { s.t0 = t; s.n0 = n; }
}

DEVICE void ball(Span& s, V o, V d) {
  float a = dot(d, d), b = dot(o, d), c = dot(o, o) - 1.0f, q = b * b - a * c;
  if (q <= 0.0f) { s.t1 = -FAR; return; }
  float r = sqrtf(q);
  s.t0 = (-b - r) / a; s.t1 = (-b + r) / a;
  s.n0 = o + d * s.t0; s.n1 = o + d * s.t1;
}

DEVICE void tapered_cylinder(Span& s, V o, V d, float taper) {  // radius 1 at z = -1, 1 - taper at z = 1
  float slope = -0.5f * taper, base = 1.0f + slope;
  slab(s, o.z, d.z, {0.0f, 0.0f, 1.0f});
  float ro = base + slope * o.z, rd = slope * d.z;
  float a = d.x * d.x + d.y * d.y - rd * rd, b = o.x * d.x + o.y * d.y - ro * rd, c = o.x * o.x + o.y * o.y - ro * ro;
  float q = b * b - a * c;
  if (fabsf(a) < 1e-9f) a = a < 0.0f ? -1e-9f : 1e-9f;
  if (q <= 0.0f) { if (a > 0.0f) s.t1 = -FAR; return; }
  float r = sqrtf(q) / fabsf(a), m = -b / a, lo = m - r, hi = m + r, enter, leave;
  if (a > 0.0f) { enter = lo; leave = hi; }
  else if (s.t0 < lo) { enter = -FAR; leave = lo; }
  else { enter = hi; leave = FAR; }
  if (enter > s.t0) {
    s.t0 = enter; V p = o + d * enter; s.n0 = {p.x, p.y, -slope * (base + slope * p.z)};
  }
  if (leave < s.t1) {
    s.t1 = leave; V p = o + d * leave; s.n1 = {p.x, p.y, -slope * (base + slope * p.z)};
  }
}

DEVICE float relief_height(const float* f, float x, float y) {
  if (f[0] < 0.5f) {  // a sum of sines
    float h = 0.0f;
    for (int k = 0; k < 5; ++k) {
      const float* w = f + 1 + 4 * k;
      h += w[0] * sinf(w[1] * x + w[2] * y + w[3]);
    }
    return h;
  }
  if (f[0] < 1.5f) {  // a grid of recesses: sharpness f1, frequencies f2 f3, phases f4 f5, thresholds f6 f7, depth f8
    return -f[8] * tanhf(f[1] * fminf(sinf(f[2] * x + f[4]) - f[6], sinf(f[3] * y + f[5]) - f[7]));
  }
  // portals: sharpness f1, half as many cells as f2 f3, phases f4 f5, half width f6, spring f7, depth f8, sill f9,
  // roundness f10, steps f11 of width f12; within a cell u and v go from -1 to 1
  float u = x * f[2] + f[4], v = y * f[3] + f[5];
  u = fabsf(u - 2.0f * floorf(0.5f * u + 0.5f)); v = v - 2.0f * floorf(0.5f * v + 0.5f);
  float rise = fmaxf(v - f[7], 0.0f);
  float lintel = f[10] > 0.0f ? -FAR : v - f[7];  // an arch ends where its sides meet
  float edge = fmaxf(fmaxf(sqrtf(u * u + f[10] * rise * rise), u) - f[6], fmaxf(f[9] - v, lintel));
  float inside = 0.0f;
  for (int k = 0; k < 4; ++k)
    if (k < f[11]) inside += 0.5f - 0.5f * tanhf(f[1] * (edge + f[12] * k));
  return f[8] * (1.0f - 2.0f * inside / f[11]);
}

DEVICE bool below(const float* f, V o, V d, float t) {
  return o.z + d.z * t < relief_height(f, o.x + d.x * t, o.y + d.y * t);
}

// First t > EPS at which the ray meets the relief, or FAR. Starting inside the solid sees nothing.
DEVICE float march(const float* f, V o, V d, Span s, int steps, V* normal) {
  bool within = s.t0 <= EPS;
  float t0 = within ? EPS : s.t0, length = s.t1 - t0, last = t0;
  if (below(f, o, d, t0)) { *normal = s.n0; return within ? FAR : t0; }
  for (int i = 1; i <= steps; ++i) {
    float a = (float)i / steps, t = t0 + length * (within ? a * a : a);
    if (below(f, o, d, t)) {
      float lo = last, hi = t;
      for (int k = 0; k < BISECT; ++k) { float m = 0.5f * (lo + hi); if (below(f, o, d, m)) hi = m; else lo = m; }
      float x = o.x + d.x * hi, y = o.y + d.y * hi;
      *normal = {(relief_height(f, x - STEP, y) - relief_height(f, x + STEP, y)) / (2.0f * STEP),
                 (relief_height(f, x, y - STEP) - relief_height(f, x, y + STEP)) / (2.0f * STEP), 1.0f};
      return hi;
    }
    last = t;
  }
  return FAR;
}

DEVICE float intersect(const float* p, V origin, V direction, int steps, V* normal) {
  int type = (int)p[0];
  V o = transform(p + 1, origin), d = rotate(p + 1, direction);
  Span s = {-FAR, FAR, {0, 0, 1}, {0, 0, 1}};
  if (type == ELLIPSOID) ball(s, o, d);
  else if (type == CYLINDER) tapered_cylinder(s, o, d, p[17]);
  else { slab(s, o.x, d.x, {1, 0, 0}); slab(s, o.y, d.y, {0, 1, 0}); slab(s, o.z, d.z, {0, 0, 1}); }
  if (p[16] < 100.0f) half_space(s, o, d, load(p + 13), p[16]);
  if (s.t1 <= s.t0 || s.t1 <= EPS) return FAR;
  if (type == ROOM) { *normal = s.n1 * -1.0f; return s.t1; }
  if (type == RELIEF) return march(p + 38, o, d, s, steps, normal);
  *normal = s.n0;
  return s.t0 > EPS ? s.t0 : FAR;
}

DEVICE bool near_sphere(const float* p, V o, V d, float dd, float tmax) {
  V c = load(p + 32) - o;
  float r2 = p[35] * p[35], t = dot(c, d) / dd;
  t = fminf(fmaxf(t, 0.0f), tmax);
  V q = c - d * t;
  return dot(q, q) <= r2;
}

DEVICE float nearest(const float* prims, const int* list, int count, V o, V d, int* which, V* normal) {
  float best = FAR; *which = -1;
  for (int i = 0; i < count; ++i) {
    int k = list ? list[i] : i;
    const float* p = prims + k * PRIM;
    if ((int)p[0] == NONE) continue;
    V n; float t = intersect(p, o, d, MARCH, &n);
    if (t < best) { best = t; *which = k; *normal = n; }
  }
  return best;
}

DEVICE bool shadowed(const float* prims, int count, V o, V d, float tmax) {
  float dd = dot(d, d);
  for (int k = 0; k < count; ++k) {
    const float* p = prims + k * PRIM;
    int type = (int)p[0];
    if (type == NONE || type == ROOM || !near_sphere(p, o, d, dd, tmax)) continue;
    V n; if (intersect(p, o, d, SHADOW_MARCH, &n) < tmax) return true;
  }
  return false;
}

DEVICE V texel(const uint8_t* t, int side, int x, int y) {
  const uint8_t* p = t + 4 * ((y & (side - 1)) * side + (x & (side - 1)));
#ifdef __CUDACC__
  uchar4 c = *reinterpret_cast<const uchar4*>(p);
  return {c.x / 255.0f, c.y / 255.0f, c.z / 255.0f};
#else
  return {p[0] / 255.0f, p[1] / 255.0f, p[2] / 255.0f};
#endif
}

// Bilinear, from the mip level whose texels come nearest to `footprint` (in repeats of the texture).
DEVICE V sample(const uint8_t* textures, float index, float u, float v, float footprint) {
  int level = (int)floorf(log2f(fmaxf(footprint * SIDE, 1e-6f)) + 0.5f);
  level = level < 0 ? 0 : level >= LEVELS ? LEVELS - 1 : level;
  const int64_t total = 87360;  // texels of all levels
  const uint8_t* base = textures + 4 * (total * (int64_t)index);
  int side = SIDE;
  for (int i = 0; i < level; ++i) { base += 4 * side * side; side >>= 1; }
  float x = (u - floorf(u)) * side - 0.5f, y = (v - floorf(v)) * side - 0.5f;
  float fx = floorf(x), fy = floorf(y);
  int ix = (int)fx, iy = (int)fy; float ax = x - fx, ay = y - fy;
  V top = mix(texel(base, side, ix, iy), texel(base, side, ix + 1, iy), ax);
  V low = mix(texel(base, side, ix, iy + 1), texel(base, side, ix + 1, iy + 1), ax);
  return mix(top, low, ay);
}

DEVICE V environment(const float* l, const uint8_t* textures, V d, float pixel) {
  float up = d.z, w = sqrtf(fminf(fabsf(up), 1.0f));
  V c = up >= 0.0f ? mix(load(l + 25), load(l + 22), w) : mix(load(l + 25), load(l + 28), w);
  float azimuth = atan2f(d.y, d.x) * 0.15915494f, elevation = asinf(fminf(fmaxf(up, -1.0f), 1.0f)) * 0.31830989f;
  V t = sample(textures, l[31], azimuth * l[33], -elevation * 0.5f * l[33], pixel * 0.16f * l[33]);
  return mix(c, c * t * 2.0f, l[32]);
}

DEVICE V albedo(const float* p, const uint8_t* textures, V q, V n, float t, float pixel, float cosine) {
  V e = load(p + 18), m = q * e;  // metres in the object's frame
  V a = {fabsf(n.x) / e.x, fabsf(n.y) / e.y, fabsf(n.z) / e.z};  // the normal, up to its length
  float u, v;
  if (a.x >= a.y && a.x >= a.z) { u = m.y; v = m.z; }
  else if (a.y >= a.z) { u = m.x; v = m.z; }
  else { u = m.x; v = m.y; }
  float size = t * pixel * rsqrtf(fmaxf(cosine, 0.1f));
  V c0 = sample(textures, p[21], u * p[23] + p[31], -v * p[23] + p[31], size * p[23]);
  V c1 = sample(textures, p[22], -v * p[24] + p[31], u * p[24], size * p[24]);
  V tint = load(p + 27);
  V c = mix(c0, c0 * c1 * 2.0f, p[26]);
  return mix(tint, c * (tint + V{0.5f, 0.5f, 0.5f}), p[25]);
}

DEVICE V lit(const float* light, const float* prims, int count, V x, V n, V view, float gloss, V color, bool shadow) {
  V position = load(light), to = light[3] > 0.5f ? position - x : position;
  float reach = light[3] > 0.5f ? 1.0f : FAR, distance2 = dot(to, to);
  float fade = light[3] > 0.5f ? 1.0f / (1.0f + distance2 / (light[7] * light[7])) : 1.0f;
  V l = unit(to);
  float diffuse = dot(n, l);
  if (diffuse <= 0.0f) return {0, 0, 0};
  if (shadow && shadowed(prims, count, x, to, reach)) return {0, 0, 0};
  float s = fmaxf(dot(n, unit(l + view)), 0.0f), s2 = s * s, s4 = s2 * s2, s8 = s4 * s4, s32 = s8 * s8 * s8 * s8;
  return (color * diffuse + V{1, 1, 1} * (gloss * s32)) * load(light + 4) * fade;
}

DEVICE V shade(const float* prims, int count, const float* l, const uint8_t* textures, V o, V d, float pixel, float t,
               int k, V normal) {
  V view = unit(d);
  if (k < 0) return environment(l, textures, view, pixel);
  const float* p = prims + k * PRIM;
  const float* m = p + 1;
  V x = o + d * t, q = transform(m, x);
  V n = unit({m[0] * normal.x + m[4] * normal.y + m[8] * normal.z, m[1] * normal.x + m[5] * normal.y + m[9] * normal.z,
              m[2] * normal.x + m[6] * normal.y + m[10] * normal.z});
  float cosine = -dot(n, view);
  if (cosine < 0.0f) { n = n * -1.0f; cosine = -cosine; }
  float far = t * sqrtf(dot(d, d));
  V c = albedo(p, textures, q, normal, far, pixel, cosine);
  V start = x + n * (2e-3f * fmaxf(far, 0.05f));
  V sum = c * mix(load(l + 19), load(l + 16), 0.5f + 0.5f * n.z) + c * p[36];
  V back = view * -1.0f;
  sum = sum + lit(l, prims, count, start, n, back, p[30], c, true);
  sum = sum + lit(l + 8, prims, count, start, n, back, p[30], c, false);
  if (p[30] > 0.02f) {
    float fresnel = p[30] * (0.15f + 0.85f * powf(fmaxf(1.0f - cosine, 0.0f), 4.0f));
    sum = mix(sum, environment(l, textures, view + n * (2.0f * cosine), 0.05f), fresnel);
  }
  return sum;
}

// Direction in the world of the ray through pixel (u, v), with z = 1 in the camera: t is the depth.
DEVICE V ray(const float* c, float u, float v) {
  return rotate(c, {(u - c[14]) / c[12], (v - c[15]) / c[13], 1.0f});
}

DEVICE void pixel_color(const float* prims, const int* list, int listed, int count, const float* l, const float* c,
                        const uint8_t* textures, float u, float v, int samples, float* rgb, float* depth) {
  V o = {c[3], c[7], c[11]}, d = ray(c, u, v), n; int k;
  float t = nearest(prims, list, listed, o, d, &k, &n), size = 1.0f / c[12];
  *depth = k < 0 ? 0.0f : t;
  if (!rgb) return;
  V sum = {0, 0, 0};
  if (samples == 1) sum = shade(prims, count, l, textures, o, d, size, t, k, n);
  for (int i = 0; samples > 1 && i < samples; ++i) {  // a rotated grid of samples
    float a = (i + 0.5f) / samples - 0.5f, b = ((i * 2 + 1) % samples + (i * 2 >= samples ? 0.0f : 0.5f)) / samples - 0.5f;
    d = ray(c, u + a, v + b);
    t = nearest(prims, list, listed, o, d, &k, &n);
    sum = sum + shade(prims, count, l, textures, o, d, size, t, k, n) * (1.0f / samples);
  }
  rgb[0] = sum.x; rgb[1] = sum.y; rgb[2] = sum.z;
}

}  // namespace

#ifdef __CUDACC__
// Block = 16 x 16 pixels of one image; first it lists the primitives whose bounding spheres its cone of rays meets.
__global__ void render_kernel(const float* prims, int count, const float* lights, const float* cameras, int views,
                              const uint8_t* textures, int height, int width, int samples, float* rgb, float* depth) {
  __shared__ int list[MAX_PRIMS];
  __shared__ int listed;
  int image = blockIdx.z, tid = threadIdx.y * 16 + threadIdx.x;
  const float* p = prims + (int64_t)(image / views) * count * PRIM;
  const float* l = lights + (int64_t)(image / views) * LIGHT;
  const float* c = cameras + (int64_t)image * CAMERA;
  float u0 = blockIdx.x * 16.0f, v0 = blockIdx.y * 16.0f;
  V axis = unit(ray(c, u0 + 8.0f, v0 + 8.0f)), origin = {c[3], c[7], c[11]};
  float low = 1.0f;
  for (int k = 0; k < 4; ++k)
    low = fminf(low, dot(axis, unit(ray(c, u0 - 0.5f + 17.0f * (k & 1), v0 - 0.5f + 17.0f * (k >> 1)))));
  float half = acosf(fminf(low, 1.0f));
  // The list keeps the primitives' order, so that equal depths resolve as in the reference.
  __shared__ unsigned char meets[MAX_PRIMS];
  for (int k = tid; k < count; k += 256) {
    const float* q = p + k * PRIM;
    V to = load(q + 32) - origin;
    float distance = sqrtf(dot(to, to)), r = q[35];
    bool hit = (int)q[0] != NONE;
    if (hit && distance > r) {
      float angle = acosf(fminf(fmaxf(dot(to, axis) / distance, -1.0f), 1.0f));
      hit = angle <= half + asinf(r / distance) + 1e-3f;
    }
    meets[k] = hit;
  }
  __syncthreads();
  if (tid == 0) {
    int found = 0;
    for (int k = 0; k < count; ++k) if (meets[k]) list[found++] = k;
    listed = found;
  }
  __syncthreads();
  int x = blockIdx.x * 16 + threadIdx.x, y = blockIdx.y * 16 + threadIdx.y;
  if (x >= width || y >= height) return;
  int64_t at = ((int64_t)image * height + y) * width + x;
  pixel_color(p, list, listed, count, l, c, textures, x + 0.5f, y + 0.5f, samples, rgb ? rgb + 3 * at : nullptr,
              depth + at);
}
#endif

// images = scenes * views; rgb may be null. Returns the CUDA error of the launch, 0 where all is well.
extern "C" int render(const float* prims, int count, const float* lights, const float* cameras, int images, int views,
                      const uint8_t* textures, int height, int width, int samples, float* rgb, float* depth,
                      void* stream) {
  if (count > MAX_PRIMS) return -1;
#ifdef __CUDACC__
  dim3 grid((width + 15) / 16, (height + 15) / 16, images), block(16, 16);
  render_kernel<<<grid, block, 0, (cudaStream_t)stream>>>(prims, count, lights, cameras, views, textures, height, width,
                                                        samples, rgb, depth);
  return (int)cudaGetLastError();
#else
  for (int64_t i = 0; i < (int64_t)images * height * width; ++i) {
    int64_t image = i / (height * width); int y = i / width % height, x = i % width;
    pixel_color(prims + image / views * count * PRIM, nullptr, count, count, lights + image / views * LIGHT,
                cameras + image * CAMERA, textures, x + 0.5f, y + 0.5f, samples, rgb ? rgb + 3 * i : nullptr, depth + i);
  }
  return 0;
#endif
}
