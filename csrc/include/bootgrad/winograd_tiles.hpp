// Convolutions of 3×3 kernels with stride 1 by Winograd's minimal filtering: a tile of 2×2 outputs from 4×4 inputs in
// 16 products in place of 36.
//
//   Y = Aᵀ [ (G g Gᵀ) ⊙ (Bᵀ d B) ] A      d 4×4 inputs, g 3×3 weights, Y 2×2 outputs
//
// summed over channels before Aᵀ…A, so that each of the 16 positions is one matrix product over channels. Transforms
// add, subtract and halve: rounding errors are up to four times a plain sum's. Source: Lavin, Gray, arXiv 1509.09308.

namespace bootgrad::BOOTGRAD_ISA {

// Bᵀ d B of a vector of channels, 16 positions to 16: rows of both transforms are combined first, columns after.
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

}  // namespace bootgrad::BOOTGRAD_ISA
