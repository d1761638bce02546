// Convolutions of 3×3 kernels with stride 1 by Winograd's minimal filtering: a tile of 2×2 outputs from 4×4 inputs in
// 16 products in place of 36.
//
//   Y = Aᵀ [ (G g Gᵀ) ⊙ (Bᵀ d B) ] A      d 4×4 inputs, g 3×3 weights, Y 2×2 outputs
//
// summed over channels before Aᵀ…A, so that each of the 16 positions is one matrix product over channels. Transforms
// add, subtract and halve: rounding errors are about twice a plain sum's. Source: Lavin, Gray, arXiv 1509.09308.
//
//   U [16, C, ldo]       G g Gᵀ            V [tiles, 16, ldc]    Bᵀ d B of a run of tiles
//   xt [pixels + 1, ldc] x, channels last, and a pixel of zeros     M [tiles, 16, ldo] products
//   yt [pixels, ldo]     the output, channels last

namespace bootgrad::BOOTGRAD_ISA {

// Between vectors of 16 positions: rows of both transforms are combined first, columns after.
template <class T>
BOOTGRAD_INLINE void winograd_input(const T* const (&d)[16], int64_t c, T* out, int64_t ld) {
  Vector<T> rows[4][4];
#pragma GCC unroll 4
  for (int j = 0; j < 4; ++j) {
    const Vector<T> d0 = load<T>(d[j] + c), d1 = load<T>(d[4 + j] + c), d2 = load<T>(d[8 + j] + c),
                    d3 = load<T>(d[12 + j] + c);
    rows[0][j] = d0 - d2, rows[1][j] = d1 + d2, rows[2][j] = d2 - d1, rows[3][j] = d1 - d3;
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    const Vector<T>(&r)[4] = rows[i];
    store<T>(out + (4 * i) * ld, r[0] - r[2]);
    store<T>(out + (4 * i + 1) * ld, r[1] + r[2]);
    store<T>(out + (4 * i + 2) * ld, r[2] - r[1]);
    store<T>(out + (4 * i + 3) * ld, r[1] - r[3]);
  }
}

template <class T>
BOOTGRAD_INLINE void winograd_output(const T* m, int64_t ld, Vector<T> (&y)[4]) {
  Vector<T> rows[2][4];
#pragma GCC unroll 4
  for (int j = 0; j < 4; ++j) {
    const Vector<T> m0 = load<T>(m + j * ld), m1 = load<T>(m + (4 + j) * ld), m2 = load<T>(m + (8 + j) * ld),
                    m3 = load<T>(m + (12 + j) * ld);
    rows[0][j] = m0 + m1 + m2, rows[1][j] = m1 - m2 - m3;
  }
#pragma GCC unroll 2
  for (int i = 0; i < 2; ++i) {
    const Vector<T>(&r)[4] = rows[i];
    y[2 * i] = r[0] + r[1] + r[2], y[2 * i + 1] = r[1] - r[2] - r[3];
  }
}

// u = G g Gᵀ of a vector of weights, [9, n] at `taps`, or of the same turned around.
template <class T>
BOOTGRAD_INLINE void winograd_weights(const T* taps, bool turned, T* out, int64_t ld) {
  const T half = T(0.5);
  Vector<T> g[9], rows[4][3];
#pragma GCC unroll 9
  for (int k = 0; k < 9; ++k) g[k] = load<T>(taps + (turned ? 8 - k : k) * kLanes<T>);
#pragma GCC unroll 3
  for (int j = 0; j < 3; ++j) {
    const Vector<T> ends = (g[j] + g[6 + j]) * half, middle = g[3 + j] * half;
    rows[0][j] = g[j], rows[1][j] = ends + middle, rows[2][j] = ends - middle, rows[3][j] = g[6 + j];
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    const Vector<T> ends = (rows[i][0] + rows[i][2]) * half, middle = rows[i][1] * half;
    store<T>(out + (4 * i) * ld, rows[i][0]);
    store<T>(out + (4 * i + 1) * ld, ends + middle);
    store<T>(out + (4 * i + 2) * ld, ends - middle);
    store<T>(out + (4 * i + 3) * ld, rows[i][2]);
  }
}

// A y Aᵀ of a vector of gradients of 2×2 outputs.
template <class T>
BOOTGRAD_INLINE void winograd_gradient(const T* const (&y)[4], int64_t o, T* out, int64_t ld) {
  Vector<T> rows[4][2];
#pragma GCC unroll 2
  for (int j = 0; j < 2; ++j) {
    const Vector<T> y0 = load<T>(y[j] + o), y1 = load<T>(y[2 + j] + o);
    rows[0][j] = y0, rows[1][j] = y0 + y1, rows[2][j] = y0 - y1, rows[3][j] = -y1;
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    store<T>(out + (4 * i) * ld, rows[i][0]);
    store<T>(out + (4 * i + 1) * ld, rows[i][0] + rows[i][1]);
    store<T>(out + (4 * i + 2) * ld, rows[i][0] - rows[i][1]);
    store<T>(out + (4 * i + 3) * ld, -rows[i][1]);
  }
}

// Gᵀ u G of a vector of sums: [9, n].
template <class T>
BOOTGRAD_INLINE void winograd_taps(const Vector<T> (&u)[16], T* taps) {
  const T half = T(0.5);
  Vector<T> rows[3][4];
#pragma GCC unroll 4
  for (int j = 0; j < 4; ++j) {
    const Vector<T> both = (u[4 + j] + u[8 + j]) * half, apart = (u[4 + j] - u[8 + j]) * half;
    rows[0][j] = u[j] + both, rows[1][j] = apart, rows[2][j] = both + u[12 + j];
  }
#pragma GCC unroll 3
  for (int i = 0; i < 3; ++i) {
    const Vector<T> both = (rows[i][1] + rows[i][2]) * half, apart = (rows[i][1] - rows[i][2]) * half;
    store<T>(taps + (3 * i) * kLanes<T>, rows[i][0] + both);
    store<T>(taps + (3 * i + 1) * kLanes<T>, apart);
    store<T>(taps + (3 * i + 2) * kLanes<T>, both + rows[i][3]);
  }
}

// Rows of tiles of an image, from `begin` to `end`, and the rows of x that they read: from `top` to `bottom`.
struct WinogradBand {
  int64_t begin, end, top, bottom;
};

// What both directions do with x: cut images into bands that stay in a core's cache, and transform their tiles.
template <class T>
struct WinogradInput {
  static constexpr int64_t n = kLanes<T>;
  // A run of tiles: long enough to be worth the traffic of what it is multiplied by, which does not always stay in a
  // cache.
  static constexpr int64_t kRun = 64;
  static constexpr int64_t kBandBytes = int64_t{2} << 20;

  const WinogradLayer& layer;
  const int64_t C = layer.C, O = layer.O, ldc = round_up<T>(C), ldo = round_up<T>(O);
  const int64_t pixels = layer.S[0] * layer.S[1], outputs = layer.P[0] * layer.P[1];
  const int64_t down = (layer.P[0] + 1) / 2, across = (layer.P[1] + 1) / 2, tiles = down * across;
  // Tiles lie a vector further apart than they are long, so that they do not all fall into the same sets of a cache.
  const int64_t v_tile = 16 * ldc + n;
  const int64_t bands, rows = (down + bands - 1) / bands;  // the most rows of tiles in a band
  const int64_t held = (2 * rows + 2 < layer.S[0] ? 2 * rows + 2 : layer.S[0]) * layer.S[1];

  WinogradInput(const WinogradLayer& l, int64_t tasks) : layer(l), bands(count_bands(tasks)) {}

  // As many as bound the memory and make `tasks` of the batch, of a run of tiles at least.
  int64_t count_bands(int64_t tasks) const {
    const int64_t bytes = (pixels * ldc + outputs * ldo) * static_cast<int64_t>(sizeof(T));
    const int64_t of_memory = (bytes + kBandBytes - 1) / kBandBytes,
                  of_tasks = (tasks + layer.B - 1) / (layer.B + !layer.B);
    int64_t count = of_memory > of_tasks ? of_memory : of_tasks;
    count = count < tiles / kRun ? count : tiles / kRun;
    count = count < down ? count : down;
    return count < 1 ? 1 : count;
  }

  WinogradBand band(int64_t r) const {
    const Range range = part(down, bands, r);
    const int64_t top = 2 * range.begin - layer.padding[0], bottom = 2 * range.end + 2 - layer.padding[0];
    const int64_t from = top < 0 ? 0 : top < layer.S[0] ? top : layer.S[0];
    return {range.begin, range.end, from, bottom < from ? from : bottom < layer.S[0] ? bottom : layer.S[0]};
  }

  // xt [held + 1, ldc]: the last pixel, and channels that only fill up, stay zeros.
  T* take_memory(Carver& carver) const { return carver.take<T>((held + 1) * ldc); }
  void clear_memory(T* xt) const { C < ldc ? clear(xt, (held + 1) * ldc) : clear(xt + held * ldc, ldc); }

  void take(int64_t b, const WinogradBand& band, T* xt) const {
    const T* x = static_cast<const T*>(layer.x) + b * C * pixels + band.top * layer.S[1];
    transpose<T>(x, pixels, C, (band.bottom - band.top) * layer.S[1], xt, ldc, T(1));
  }

  // Tile t of a band, counted from its first.
  void transform(int64_t t, const WinogradBand& band, const T* xt, T* v) const {
    const int64_t top = (band.begin + t / across) * 2 - layer.padding[0], left = t % across * 2 - layer.padding[1];
    const T* d[16];
    for (int64_t i = 0; i < 4; ++i)
      for (int64_t j = 0; j < 4; ++j) {
        const int64_t h = top + i, w = left + j;
        const bool inside = h >= 0 && h < layer.S[0] && w >= 0 && w < layer.S[1];
        d[4 * i + j] = xt + (inside ? (h - band.top) * layer.S[1] + w : held) * ldc;
      }
    for (int64_t c = 0; c < ldc; c += n) winograd_input<T>(d, c, v + c, ldc);
  }
};

template <class T>
struct Winograd {
  explicit Winograd(const WinogradCall& c) : call(c) {}

  void run() {
    Carver c{0};
    for (int round = 0; round < 2; ++round) {
      if (round == 1) c = {reinterpret_cast<uintptr_t>(call.runtime->scratch(kSharedScratch, c.used))};
      u = c.take<T>(16 * u_position);
      bias = c.take<T>(ldo);
      row = c.take<int64_t>(chunk);
      depth = c.take<int64_t>(C);
    }
    for (int64_t m = 0; m < chunk; ++m) row[m] = m * in.v_tile;
    for (int64_t k = 0; k < C; ++k) depth[k] = k;
    clear(bias, ldo);
    if (call.bias) copy_row(static_cast<const T*>(call.bias), bias, O);
    transform_weights();
    share(
        *call.runtime, (call.B + together - 1) / together * in.bands,
        [&](Carver& carver) {
          return Memory{in.take_memory(carver), carver.take<T>(chunk * in.v_tile), carver.take<T>(chunk * m_tile),
                        carver.take<T>(2 * in.rows * call.P[1] * ldo)};
        },
        [&](const Memory& m) { in.clear_memory(m.xt); },
        [&](int64_t task, const Memory& m) {
          together > 1 ? small_images(task * together, m) : band_of_image(task / in.bands, in.band(task % in.bands), m);
        });
  }

 private:
  static constexpr int64_t n = kLanes<T>, kRun = WinogradInput<T>::kRun;
  const WinogradCall& call;
  const WinogradInput<T> in{call, 16};
  const int64_t C = in.C, O = in.O, ldc = in.ldc, ldo = in.ldo;
  const int64_t m_tile = 16 * ldo + n, u_position = C * ldo + n;
  const int64_t together = in.tiles < kRun ? kRun / in.tiles : 1;  // images to a task, where they are small
  const int64_t most = together > 1 ? in.tiles * together : in.rows * in.across;
  const int64_t chunk = most < 2 * kRun ? most : kRun;  // tiles that are multiplied at once
  T *u = nullptr, *bias = nullptr;
  int64_t *row = nullptr, *depth = nullptr;

  struct Memory {
    T *xt, *v, *m, *yt;
  };

  // A task has a vector of output channels, of all input channels.
  void transform_weights() const {
    share(
        *call.runtime, ldo / n, [](Carver& c) { return c.take<T>(n * 9 * n); }, [](T*) {},
        [&](int64_t task, T* taps) {
          const int64_t o = task * n, lanes = O - o < n ? O - o : n;
          for (int64_t c = 0; c < C; c += n) {
            const int64_t count = C - c < n ? C - c : n;
            take_taps(o, lanes, c, count, taps);
            for (int64_t k = 0; k < count; ++k)
              winograd_weights<T>(taps + k * 9 * n, call.transposed, u + (c + k) * ldo + o, u_position);
          }
        });
  }

  // taps[c, k, o] of some channels.
  void take_taps(int64_t o, int64_t lanes, int64_t c, int64_t count, T* taps) const {
    const T* w = static_cast<const T*>(call.weight);
    if (lanes < n) clear(taps, n * 9 * n);
    if (!call.transposed) return transpose<T>(w + (o * C + c) * 9, C * 9, lanes, count * 9, taps, n, T(1));
    [[maybe_unused]] const T* const end = w + C * O * 9;
    for (int64_t k = 0; k < count; ++k, taps += 9 * n) {
      const T* from = w + ((c + k) * O + o) * 9;
      if constexpr (n >= 9) {
        if (lanes == n && from + (n - 1) * 9 + n <= end) {  // rows of nine in a square of n
          Vector<T> square[n];
#pragma GCC unroll 16
          for (int i = 0; i < n; ++i) square[i] = load<T>(from + i * 9);
          transpose_square<T>(square);
#pragma GCC unroll 9
          for (int i = 0; i < 9; ++i) store<T>(taps + i * n, square[i]);
          continue;
        }
      }
      transpose<T>(from, 9, lanes, 9, taps, n, T(1));
    }
  }

  void small_images(int64_t begin, const Memory& m) const {
    const int64_t end = begin + together < call.B ? begin + together : call.B;
    const WinogradBand whole = in.band(0);
    for (int64_t b = begin; b < end; ++b) {
      in.take(b, whole, m.xt);
      for (int64_t t = 0; t < in.tiles; ++t)
        in.transform(t, whole, m.xt, m.v + ((b - begin) * in.tiles + t) * in.v_tile);
    }
    multiply(m, (end - begin) * in.tiles);
    for (int64_t b = begin; b < end; ++b) {
      write_tiles(whole, {0, in.tiles}, m.m + (b - begin) * in.tiles * m_tile, m.yt);
      write(b, whole, m.yt);
    }
  }

  void band_of_image(int64_t b, const WinogradBand& band, const Memory& m) const {
    const int64_t tiles = (band.end - band.begin) * in.across, runs = (tiles + chunk - 1) / chunk;
    in.take(b, band, m.xt);
    for (int64_t r = 0; r < runs; ++r) {
      const Range range = part(tiles, runs, r);
      for (int64_t t = range.begin; t < range.end; ++t)
        in.transform(t, band, m.xt, m.v + (t - range.begin) * in.v_tile);
      multiply(m, range.end - range.begin);
      write_tiles(band, range, m.m, m.yt);
    }
    write(b, band, m.yt);
  }

  void multiply(const Memory& m, int64_t count) const {
    for (int64_t k = 0; k < 16; ++k)
      gemm<T>(count, O, C, {m.v + k * ldc, row, depth}, u + k * u_position, ldo,
              Store<T>{m.m + k * ldo, m_tile, ldo, T(1), false, nullptr});
  }

  void write_tiles(const WinogradBand& band, Range range, const T* products, T* yt) const {
    const int64_t line = call.P[1] * ldo;
    for (int64_t t = range.begin; t < range.end; ++t, products += m_tile) {
      const int64_t h = t / in.across * 2, w = t % in.across * 2;
      const bool below = 2 * band.begin + h + 1 < call.P[0], beside = w + 1 < call.P[1];
      T* y = yt + h * line + w * ldo;
      for (int64_t o = 0; o < ldo; o += n) {
        Vector<T> out[4];
        winograd_output<T>(products + o, ldo, out);
        const Vector<T> shift = load<T>(bias + o);
        store<T>(y + o, out[0] + shift);
        if (beside) store<T>(y + ldo + o, out[1] + shift);
        if (below) store<T>(y + line + o, out[2] + shift);
        if (below && beside) store<T>(y + line + ldo + o, out[3] + shift);
      }
    }
  }

  void write(int64_t b, const WinogradBand& band, const T* yt) const {
    const int64_t begin = 2 * band.begin, end = 2 * band.end < call.P[0] ? 2 * band.end : call.P[0];
    transpose<T>(yt, ldo, (end - begin) * call.P[1], O,
                 static_cast<T*>(call.out) + b * O * in.outputs + begin * call.P[1], in.outputs, T(1));
  }
};

// The adjoint by the weights, Σ_i w_i Σ_tiles Gᵀ [ (A gy Aᵀ) ⊙ (Bᵀ d B) ] G: blocks of images have sums of their own,
// as many as the layer's shape says, and are added up in order. Where they are few, each is made in parts of the
// output's channels.
//
//   sums [blocks, 16, O, ldc]     gyt [positions of a band + 1, ldz] a part of gy, channels last, and zeros
//   z [tiles, 16, ldz] A gy Aᵀ
template <class T>
struct WinogradSum {
  explicit WinogradSum(const WinogradSumCall& c) : call(c) {}

  void run() {
    Carver c{0};
    for (int round = 0; round < 2; ++round) {
      if (round == 1) c = {reinterpret_cast<uintptr_t>(call.runtime->scratch(kSharedScratch, c.used))};
      sums = c.take<T>(blocks * 16 * position);
      row = c.take<int64_t>(ldz);
      depth = c.take<int64_t>(chunk);
    }
    for (int64_t o = 0; o < ldz; ++o) row[o] = o;
    for (int64_t k = 0; k < chunk; ++k) depth[k] = k * z_tile;
    share(
        *call.runtime, blocks * parts,
        [&](Carver& carver) {
          return Memory{in.take_memory(carver), carver.take<T>((positions + 1) * ldz),
                        carver.take<T>(chunk * in.v_tile), carver.take<T>(chunk * z_tile)};
        },
        [&](const Memory& m) {
          in.clear_memory(m.xt);
          clear(m.gyt + positions * ldz, ldz);
        },
        [&](int64_t task, const Memory& m) {
          const Range vectors = part(in.ldo / n, parts, task % parts);
          const Range channels{vectors.begin * n, vectors.end * n < O ? vectors.end * n : O};
          add_images(part(call.B, blocks, task / parts), channels, m, sums + task / parts * 16 * position);
        });
    share(
        *call.runtime, O, [](Carver& carver) { return carver.take<T>(9 * n); }, [](T*) {},
        [&](int64_t o, T* taps) { finish(o, taps); });
  }

 private:
  static constexpr int64_t n = kLanes<T>, chunk = WinogradInput<T>::kRun;
  const WinogradSumCall& call;
  const WinogradInput<T> in{call, 1};
  const int64_t C = in.C, O = in.O, ldc = in.ldc, position = O * ldc + n;
  const int64_t blocks = count_blocks(), parts = count_parts();
  const int64_t ldz = (in.ldo / n + parts - 1) / parts * n, z_tile = 16 * ldz + n;
  const int64_t positions = 2 * in.rows * call.P[1];
  T* sums = nullptr;
  int64_t *row = nullptr, *depth = nullptr;

  struct Memory {
    T *xt, *gyt, *v, *z;
  };

  // A block is worth its sum's traffic from some 256 tiles on; several together take 16 MiB at most.
  int64_t count_blocks() const {
    const int64_t worth = call.B * in.tiles / 256;
    int64_t count = (int64_t{16} << 20) / (16 * O * ldc * static_cast<int64_t>(sizeof(T)));
    const int64_t bounds[] = {worth, call.B, 16};
    for (const int64_t bound : bounds) count = bound < count ? bound : count;
    return count < 1 ? 1 : count;
  }

  // Each transforms the tiles of x anew: little beside the products with 128 channels.
  int64_t count_parts() const {
    const int64_t wanted = (8 + blocks - 1) / blocks, worth = O / 128;
    const int64_t count = wanted < worth ? wanted : worth;
    return count < 1 ? 1 : count;
  }

  void add_images(Range images, Range channels, const Memory& m, T* sum) const {
    const int64_t width = channels.end - channels.begin;
    T* const target = sum + channels.begin * ldc;
    int64_t waiting = 0;  // tiles that wait to be multiplied
    bool first = true;
    const auto multiply = [&] {
      for (int64_t k = 0; k < 16; ++k)
        gemm<T>(width, C, waiting, {m.z + k * ldz, row, depth}, m.v + k * ldc, in.v_tile,
                Store<T>{target + k * position, ldc, ldc, T(1), !first, nullptr});
      first = false, waiting = 0;
    };
    for (int64_t b = images.begin; b < images.end; ++b) {
      const T weight = call.w ? static_cast<const T*>(call.w)[b] : T(1);
      const T* gy = static_cast<const T*>(call.gy) + (b * O + channels.begin) * in.outputs;
      for (int64_t r = 0; r < in.bands; ++r) {
        const WinogradBand band = in.band(r);
        const int64_t begin = 2 * band.begin, end = 2 * band.end < call.P[0] ? 2 * band.end : call.P[0];
        in.take(b, band, m.xt);
        transpose<T>(gy + begin * call.P[1], in.outputs, width, (end - begin) * call.P[1], m.gyt, ldz, weight);
        for (int64_t t = 0; t < (band.end - band.begin) * in.across; ++t) {
          in.transform(t, band, m.xt, m.v + waiting * in.v_tile);
          transform_gradient(t, end - begin, m.gyt, m.z + waiting * z_tile);
          if (++waiting == chunk) multiply();
        }
      }
    }
    if (waiting || first) multiply();  // with no tile at all it stores zeros
  }

  // Tile t of a band that has so many lines of outputs.
  void transform_gradient(int64_t t, int64_t lines, const T* gyt, T* z) const {
    const int64_t h = t / in.across * 2, w = t % in.across * 2;
    const bool below = h + 1 < lines, beside = w + 1 < call.P[1];
    const int64_t at = h * call.P[1] + w;
    const T* y[4] = {gyt + at * ldz, gyt + (beside ? at + 1 : positions) * ldz,
                     gyt + (below ? at + call.P[1] : positions) * ldz,
                     gyt + (below && beside ? at + call.P[1] + 1 : positions) * ldz};
    for (int64_t o = 0; o < ldz; o += n) winograd_gradient<T>(y, o, z + o, ldz);
  }

  void finish(int64_t o, T* taps) const {
    for (int64_t c = 0; c < C; c += n) {
      Vector<T> u[16];
      for (int64_t k = 0; k < 16; ++k) {
        const T* from = sums + k * position + o * ldc + c;
        u[k] = load<T>(from);
        for (int64_t block = 1; block < blocks; ++block) u[k] += load<T>(from + block * 16 * position);
      }
      winograd_taps<T>(u, taps);
      T* out = static_cast<T*>(call.out) + (o * C + c) * 9;
      const int64_t count = C - c < n ? C - c : n;
      for (int64_t l = 0; l < count; ++l)
        for (int64_t k = 0; k < 9; ++k) out[l * 9 + k] = taps[k * n + l];
    }
  }
};

inline void winograd(const WinogradCall& call) { Winograd<float>(call).run(); }
inline void winograd_sum(const WinogradSumCall& call) { WinogradSum<float>(call).run(); }

}  // namespace bootgrad::BOOTGRAD_ISA
