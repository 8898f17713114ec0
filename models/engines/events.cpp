// The event engine: a spiking layer computed spike by spike, in float or double.
//
// A spike of channel c at pixel q adds a row of the weights to every output under the kernel. So a layer's currents y,
// and Q, the sum over time of its spikes correlated with its currents, cost as much as there are spikes. The currents of
// a tile of outputs live in the cache, in
//   pass A for their sums, which the batch norm needs, and Q; and in
//   pass B, once more, for the neurons to fire. Where spikes are many, pass A keeps the currents for pass B, and so one
// layer's T steps are in memory until it has fired; else no tensor of T steps in floating point ever is.
//
// Layouts. Images n = t*B + b of H*W pixels of C channels; C, and the O of the output, are whole words of 16.
//   bits     (n, pixel, C/16)          uint16, a spike a bit
//   active   all spikes in the order of (n, pixel, channel), each as x*C + c in uint16; those of image n begin at
//            base[n] + 16*n, those of its pixel p ptr[n*(H*W + 1) + p] further
//   weights  (O/OB, k*k*C + 1, OB)     blocks of OB output channels; a row for each (dy, dx, c), and one of zeros
//   Q        (copies, O/OB, k*k*C, OB)
//   a tile   (frames, PH, PW, OB)      some rows of the output of some images, with a border around each frame
// How the work is shared among threads depends on their number alone: as many threads give the same bits.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <type_traits>
#include <vector>
#ifdef __AVX2__
#include <immintrin.h>
#endif
#define UNROLL _Pragma("GCC unroll 16")

namespace {
using std::max;
using std::min;

// ---- vectors as wide as the machine's, by the compiler's extension ------------------------------------------------
#if defined(__AVX512F__) && defined(__AVX512DQ__)
#define DSR_AVX512
constexpr int BYTES = 64;
#elif defined(__AVX2__)
constexpr int BYTES = 32;
#else
constexpr int BYTES = 16;
#endif
constexpr int WORD = 16;                   // channels in a word of bits
constexpr int LINE = 64;                   // bytes of a cache line
constexpr int ROOM = 1 << 17;              // spikes of a tile for which there is room without counting them
constexpr int64_t FAR = 1 << 20;           // bytes of a tensor, from which on caches do not hold it until it is read
constexpr int WIDE = BYTES == 32 ? 1 : 2;  // vectors of which nine fit into the registers, and more
template <class F> struct OfWidth { typedef F type __attribute__((vector_size(BYTES), aligned(sizeof(F)), may_alias)); };
template <class F> using Vector = typename OfWidth<F>::type;
template <class F> constexpr int LANES = BYTES / sizeof(F);
typedef uint16_t Shorts __attribute__((vector_size(32), aligned(2), may_alias));
template <class F> inline Vector<F> load(const F* p) { return *reinterpret_cast<const Vector<F>*>(p); }
template <class F> inline void store(F* p, Vector<F> v) { *reinterpret_cast<Vector<F>*>(p) = v; }
// Past the caches, which need not read what was there: p is aligned, and `streamed` comes behind the last.
template <class F> inline void stream(F* p, Vector<F> v) {
#ifdef DSR_AVX512
  _mm512_stream_si512((__m512i*)p, (__m512i)v);
#elif defined(__AVX2__)
  _mm256_stream_si256((__m256i*)p, (__m256i)v);
#else
  store(p, v);
#endif
}
inline void streamed() {
#ifdef __AVX2__
  _mm_sfence();
#endif
}

// Masks: the lanes of x >= y, or those that bits name; the bits of a mask; x in its lanes, 0 in the others.
#ifdef DSR_AVX512
template <class F> using Mask = std::conditional_t<sizeof(F) == 4, __mmask16, __mmask8>;
inline __mmask16 reached(Vector<float> x, Vector<float> y) { return _mm512_cmp_ps_mask(x, y, _CMP_GE_OQ); }
inline __mmask8 reached(Vector<double> x, Vector<double> y) { return _mm512_cmp_pd_mask(x, y, _CMP_GE_OQ); }
inline Vector<float> where(__mmask16 mask, Vector<float> x) { return _mm512_maskz_mov_ps(mask, x); }
inline Vector<double> where(__mmask8 mask, Vector<double> x) { return _mm512_maskz_mov_pd(mask, x); }
template <class F> inline Mask<F> lanes_of(uint32_t bits) { return bits; }
template <class F> inline uint32_t bits_of(Mask<F> mask) { return mask; }
#else
template <class F> using Mask = Vector<std::conditional_t<sizeof(F) == 4, int32_t, int64_t>>;  // -1 and 0
template <class V> inline auto reached(V x, V y) { return x >= y; }
template <class M, class V> inline V where(M mask, V x) { return (V)(mask & (M)x); }
template <class F> inline Mask<F> lanes_of(uint32_t bits) {
  Mask<F> powers;
  for (int i = 0; i < LANES<F>; i++) powers[i] = 1 << i;
  return ((Mask<F>{} + std::conditional_t<sizeof(F) == 4, int32_t, int64_t>(bits)) & powers) != 0;
}
template <class F> inline uint32_t bits_of(Mask<F> mask) {
#ifdef __AVX2__
  if constexpr (sizeof(F) == 4) return _mm256_movemask_ps((__m256)mask);
  else return _mm256_movemask_pd((__m256d)mask);
#else
  uint32_t bits = 0;
  for (int i = 0; i < LANES<F>; i++) bits |= uint32_t(mask[i] & 1) << i;
  return bits;
#endif
}
#endif

// work(id, its share of 0..n) on all threads
struct Share { int64_t from, to; };
template <class Work> void on_threads(int64_t n, Work work) {
  const int64_t threads = torch::stable::get_num_threads();
  torch::stable::parallel_for(0, threads, 1, [&](int64_t id, int64_t end) {
    for (; id < end; id++) work(id, Share{n * id / threads, n * (id + 1) / threads});
  });
}

// ---- a layer, and where the spikes of a tile are -------------------------------------------------------------------
template <class F> struct Branch {  // a convolution of a spike train; or (k = 0) a train times `scale`, or `values`
  const uint16_t *bits, *active;
  const int64_t* base;
  const uint32_t* ptr;
  const F *weights, *values;
  F* Q;  // or null
  double scale;
  int H, W, C, k, s, p;                         // kernel, stride and padding of both axes
  int still;                                    // one step's values for all
  const uint16_t* spikes(int64_t n) const { return active + base[n] + WORD * n; }
  int taps() const { return (k + s - 1) / s; }  // outputs in a row that one spike reaches
  int rows() const { return k * k * C; }
};
template <class F> struct Layer {
  const Branch<F>* branches;
  const F* bias;
  F* y;  // all currents, from pass A for pass B; or null
  int n_branches, T, B, H, W, O, OB;
  int scatter, split;        // currents by channel, not by output; threads share output channels, not images
  int frames, images, rows;  // of a tile of pass A; images of one step, and rows, of a tile of pass B
  const Branch<F>* begin() const { return branches; }
  const Branch<F>* end() const { return branches + n_branches; }
  int64_t row(int block, int64_t n, int row) const {  // of y, where steps lie side by side
    return ((((int64_t(block) * B + n % B) * H + row) * T + n / B) * W) * OB;
  }
};
struct Tile {  // rows y0 to y1 of the images first + f % group + f / group * B, for each frame f
  int64_t first, B;
  int frames, group, y0, y1, top, left, PW;
  int height() const { return y1 - y0 + 2 * top; }
  int cell(int f, int y) const { return (f * height() + y - y0 + top) * PW + left; }
  int64_t image(int f) const { return first + f % group + f / group * B; }
};
template <class F> Tile with_border(const Layer<F>& L, Tile t) {  // as much as a spike may reach beyond the tile
  int right = 0;
  for (auto& b : L)
    if (b.k) {
      const int before = b.taps() - 1 - b.p / b.s;
      t.top = max({t.top, t.y1 - t.y0 < L.H ? b.taps() - 1 : before, (b.H - 1 + b.p) / b.s - L.H + 1});
      t.left = max(t.left, before), right = max(right, (b.W - 1 + b.p) / b.s - L.W + 1);
    }
  t.PW = t.left + L.W + right;
  return t;
}
template <class Row> inline void for_rows(const Tile& t, Row row) {
  for (int f = 0; f < t.frames; f++)
    for (int y = t.y0; y < t.y1; y++) row(t.cell(f, y), t.image(f), y);
}

struct Place { uint32_t list; uint16_t cell, quads; };  // an output: its list, of so many fours
struct Gathered {  // for every output, the rows of the weights that the spikes under the kernel select
  std::vector<uint16_t> lists;
  std::vector<Place> places, sorted;
  std::vector<uint32_t> count;
  size_t used;
};
// The outputs of one row. `ptr` is that of the input's row under the kernel's first, of which `from` to `to` exist.
// Lists are filled up to fours by the row of zeros.
template <class F>
void gather_row(const Branch<F>& b, const uint32_t* ptr, const uint16_t* active, int from, int to, int W, int cell,
                Place* place, Gathered& g) {
  uint16_t *const lists = g.lists.data(), *begin = lists + g.used, zeros = b.rows();
  const int C = b.C, k = b.k, s = b.s, p = b.p, W_in = b.W;
  for (int x = 0; x < W; x++) {
    const int x_in = x * s - p, x0 = min(max(x_in, 0), W_in), x1 = max(x0, min(x_in + k, W_in));
    uint16_t* out = begin;
    for (int dy = from; dy < to; dy++) {
      const uint32_t first = ptr[dy * W_in + x0], n = ptr[dy * W_in + x1] - first;
      const uint16_t shift = (dy * k - x_in) * C;  // from x*C + c to a row of the weights
      uint32_t j = 0;
      do *(Shorts*)(out + j) = *(const Shorts*)(active + first + j) + shift;
      while ((j += 16) < n);
      out += n;
    }
    out[0] = out[1] = out[2] = zeros;
    const uint16_t quads = (out - begin + 3) / 4;
    place[x] = {uint32_t(begin - lists), uint16_t(cell + x), quads};
    begin += 4 * quads;
  }
  g.used = begin - lists;
}
// Outputs in the order of their lists' lengths, so that the loops over the lists are predicted.
template <class F> void gather(const Layer<F>& L, const Branch<F>& b, const Tile& t, Gathered& g) {
  g.places.resize(t.frames * (t.y1 - t.y0) * L.W);
  g.used = 0;
  Place* place = g.places.data();
  for_rows(t, [&](int cell, int64_t n, int y) {
    const size_t most = L.W * (min<size_t>(b.rows(), b.base[n + 1] - b.base[n]) + 8) + 64;
    if (g.lists.size() < g.used + most) g.lists.resize(2 * (g.used + most) + 4096);
    const int y_in = y * b.s - b.p;
    const uint32_t* ptr = b.ptr + n * (b.H * b.W + 1) + int64_t(y_in) * b.W;
    gather_row(b, ptr, b.spikes(n), max(0, -y_in), min(b.k, b.H - y_in), L.W, cell, place, g);
    place += L.W;
  });
  g.count.assign(b.rows() / 4 + 3, 0);
  for (const Place& p : g.places) g.count[p.quads + 1]++;
  for (size_t i = 2; i < g.count.size(); i++) g.count[i] += g.count[i - 1];
  g.sorted.resize(g.places.size());
  for (const Place& p : g.places) g.sorted[g.count[p.quads]++] = p;
}

template <class F> struct Channels {  // for every (class, input channel), the cells of its spikes
  std::vector<uint16_t> cells;
  std::vector<F> values;           // or none: all 1
  std::vector<uint32_t> from, to;  // in `cells` and `values`, each with room for one more
};
// A spike at (y, x) meets the outputs (y + p - dy)/s, (x + p - dx)/s of those taps (dy, dx) for which these are whole:
// its class is ((y + p) % s, (x + p) % s), its cell the first of these outputs; the others lie before it.
template <class F> void by_channel(const Branch<F>& b, const Tile& t, Channels<F>& s) {
  const uint64_t inverse = (1ull << 32) / b.C + 1;
  const int C = b.C, y0 = max(0, t.y0 * b.s - b.p), y1 = min(b.H, (t.y1 + b.taps() - 1) * b.s - b.p);
  std::vector<std::pair<uint16_t, uint16_t>> columns(b.W);  // what x adds to a spike's key and cell
  for (int x = 0; x < b.W; x++) columns[x] = {(x + b.p) % b.s * C, (x + b.p) / b.s};
  const auto* column = columns.data();
  auto for_all = [&](auto use) {  // use(key, cell, value) of each spike, or of each value, zeros too
    for (int f = 0; f < t.frames; f++)
      for (int y = y0; y < y1; y++) {
        const int64_t n = t.image(f), row = n * b.H + y;
        const int cell = t.cell(f, (y + b.p) / b.s), key = (y + b.p) % b.s * b.s * C;
        if (b.values) {
          const F* value = b.values + row * b.W * C;
          for (int x = 0; x < b.W; x++)
            for (int c = 0; c < C; c++) use(key + column[x].first + c, cell + column[x].second, *value++);
          continue;
        }
        const uint32_t* ptr = b.ptr + row * b.W + n;
        const uint16_t *spike = b.spikes(n) + ptr[0], *end = b.spikes(n) + ptr[b.W];
        for (; spike < end; spike++) {
          const uint32_t x = *spike * inverse >> 32;
          use(key + column[x].first + *spike - x * C, cell + column[x].second, F(1));
        }
      }
  };
  const size_t most = t.frames * ((max(y0, y1) - y0 + b.s - 1) / b.s) * ((b.W + b.s - 1) / b.s);
  s.to.assign(b.s * b.s * C, most), s.from.resize(s.to.size());
  uint32_t* const to = s.to.data();
  if (most * s.to.size() > ROOM) {  // as many as there could be are too many: count
    std::fill(s.to.begin(), s.to.end(), 0);
    for_all([=](int key, int, F value) { to[key] += value != 0; });
  }
  uint32_t all = 0;
  for (size_t key = 0; key < s.to.size(); key++) s.from[key] = all, all += to[key] + 1, to[key] = s.from[key];
  s.cells.resize(max<size_t>(s.cells.size(), all));
  s.values.resize(b.values ? max<size_t>(s.values.size(), all) : 0);
  uint16_t* const cells = s.cells.data();
  F* const values = s.values.data();
  for_all([=, real = b.values != nullptr](int key, int cell, F value) {
    const uint32_t i = to[key];  // the next is written over it if it is 0
    cells[i] = cell, to[key] = i + (value != 0);
    if (real) values[i] = value;
  });
}

// ---- kernels --------------------------------------------------------------------------------------------------------
template <class F, int OB> inline void add_rows(F* y, const F* weights, const uint16_t* list, int quads) {
  constexpr int N = OB / LANES<F>, CHAINS = N >= 4 ? 1 : 4 / N;  // sums that do not wait for each other
  Vector<F> sum[CHAINS][N];
  UNROLL for (int v = 0; v < N; v++) {
    sum[0][v] = load(y + v * LANES<F>);
    UNROLL for (int k = 1; k < CHAINS; k++) sum[k][v] = Vector<F>{};
  }
  for (; quads; quads--, list += 4)
    UNROLL for (int u = 0; u < 4; u++) {
      const F* row = weights + size_t(list[u]) * OB;
      UNROLL for (int v = 0; v < N; v++) sum[u % CHAINS][v] += load(row + v * LANES<F>);
    }
  UNROLL for (int v = 0; v < N; v++) {
    UNROLL for (int k = 1; k < CHAINS; k++) sum[0][v] += sum[k][v];
    store(y + v * LANES<F>, sum[0][v]);
  }
}
// For R*S taps, all of which the spikes of one channel at some cells reach: CORRELATE adds y at (cell - r*PW - s) to
// w[r][s] (times a value, if REAL), SCATTER adds w[r][s] to y there.
enum Mode { CORRELATE, REAL, SCATTER };
template <class F, int OB, int N, Mode MODE, int R, int S>
inline void patches(F* y, int PW, F* w, int64_t w_row, int64_t w_column, const uint16_t* cells, const F* values, int n) {
  constexpr int L = LANES<F>;
  const int64_t row = int64_t(PW) * OB;
  Vector<F> sum[R][S][N];
  UNROLL for (int r = 0; r < R; r++) UNROLL for (int s = 0; s < S; s++) UNROLL for (int v = 0; v < N; v++)
    sum[r][s][v] = load(w + r * w_row + s * w_column + v * L);
  for (int j = 0; j < n; j++) {
    F* at = y + int64_t(cells[j]) * OB;
    const Vector<F> value = Vector<F>{} + (MODE == REAL ? values[j] : F(1));
    UNROLL for (int r = 0; r < R; r++) UNROLL for (int s = 0; s < S; s++) UNROLL for (int v = 0; v < N; v++) {
      F* met = at - r * row - s * OB + v * L;
      if (MODE == SCATTER) store(met, load(met) + sum[r][s][v]);
      else sum[r][s][v] += MODE == REAL ? value * load(met) : load(met);
    }
  }
  if (MODE != SCATTER)
    UNROLL for (int r = 0; r < R; r++) UNROLL for (int s = 0; s < S; s++) UNROLL for (int v = 0; v < N; v++)
      store(w + r * w_row + s * w_column + v * L, sum[r][s][v]);
}
template <class Use> inline void as_constant(int n, Use use) {  // 1 to 3
  if (n == 1) use(std::integral_constant<int, 1>());
  if (n == 2) use(std::integral_constant<int, 2>());
  if (n == 3) use(std::integral_constant<int, 3>());
}
// One block of output channels; w: of its weights or of Q
template <class F, int OB, Mode MODE> void for_patches(const Branch<F>& b, const Channels<F>& s, F* w, F* y, int PW) {
  constexpr int N = min(WIDE, OB / LANES<F>);
  const int64_t column = int64_t(b.s) * b.C * OB, row = column * b.k;
  for (int tap = 0; tap < b.s * b.s; tap++) {
    const int ay = tap / b.s, ax = tap % b.s;
    as_constant((b.k - ay + b.s - 1) / b.s, [&](auto R) {
      as_constant((b.k - ax + b.s - 1) / b.s, [&](auto S) {
        for (int c = 0; c < b.C; c++) {
          const uint32_t from = s.from[tap * b.C + c], n = s.to[tap * b.C + c] - from;
          if (!n) continue;
          for (int o = 0; o < OB; o += N * LANES<F>)
            patches<F, OB, N, MODE, R(), S()>(y + o, PW, w + ((ay * b.k + ax) * int64_t(b.C) + c) * OB + o, row, column,
                                              &s.cells[from], MODE == REAL ? &s.values[from] : nullptr, n);
        }
      });
    });
  }
}

// ---- the currents of a tile ------------------------------------------------------------------------------------------
template <class F> struct Scratch {
  std::vector<F> room;
  F* y;  // in it, where vectors do not straddle cache lines
  std::vector<Gathered> gathered;
  std::vector<Channels<F>> channels;
  int frames = 0;  // of the tile whose border is clear
  void begin(const Layer<F>& L) {
    frames = 0;
    if (int(gathered.size()) < L.n_branches) gathered.resize(L.n_branches), channels.resize(L.n_branches);
  }
  void find_spikes(const Layer<F>& L, const Tile& t, bool for_Q) {
    const size_t size = size_t(t.frames) * t.height() * t.PW * L.OB + LINE / sizeof(F);
    room.resize(max(room.size(), size));
    y = reinterpret_cast<F*>((reinterpret_cast<uintptr_t>(room.data()) + LINE - 1) / LINE * LINE);
    for (int k = 0; k < L.n_branches; k++) {
      const Branch<F>& b = L.branches[k];
      if (b.k && !b.values && !L.scatter) gather(L, b, t, gathered[k]);
      if (b.k && (L.scatter || (for_Q && b.Q))) by_channel(b, t, channels[k]);
    }
  }
};
template <class F> Scratch<F>& own_scratch(const Layer<F>& L) {  // of a thread, which keeps it: new memory is slow
  static thread_local Scratch<F> scratch;
  scratch.begin(L);
  return scratch;
}
// The bias, and what needs no kernel: the first of these is added to the bias, the others to what is there.
template <class F, int OB> void start_currents(const Layer<F>& L, const Tile& t, int block, F* y) {
  constexpr int N = OB / LANES<F>;
  Vector<F> bias[N];
  for (int v = 0; v < N; v++) bias[v] = load(L.bias + block * OB + v * LANES<F>);
  auto add = [&, W = L.W](int64_t images, bool started, auto value) {  // value(pixel, v)
    for_rows(t, [&](int cell, int64_t n, int row) {
      F* to = y + int64_t(cell) * OB;
      for (int64_t pixel = (n % images * L.H + row) * W, end = pixel + W; pixel < end; pixel++, to += OB)
        UNROLL for (int v = 0; v < N; v++)
          store(to + v * LANES<F>, (started ? load(to + v * LANES<F>) : bias[v]) + value(pixel, v));
    });
  };
  const int64_t O = L.O, images = int64_t(L.T) * L.B;
  bool started = false;
  for (auto& b : L) {
    if (b.k) continue;
    const F* values = b.values + block * OB;
    const uint16_t* bits = b.bits + block * (OB / WORD);
    const Vector<F> scale = Vector<F>{} + F(b.scale);
    if (b.values) add(b.still ? L.B : images, started, [=](int64_t p, int v) { return load(values + p * O + v * LANES<F>); });
    else add(images, started, [=](int64_t p, int v) {
      return where(lanes_of<F>(bits[p * (O / WORD) + v * LANES<F> / WORD] >> v * LANES<F> % WORD), scale);
    });
    started = true;
  }
  if (!started) add(images, false, [](int64_t, int) { return Vector<F>{}; });
}
template <class F, int OB> void currents(const Layer<F>& L, const Tile& t, int block, Scratch<F>& scratch) {
  F* const y = scratch.y;
  start_currents<F, OB>(L, t, block, y);
  for (int k = 0; k < L.n_branches; k++) {
    const Branch<F>& b = L.branches[k];
    if (!b.k || b.values) continue;
    const F* weights = b.weights + int64_t(block) * (b.rows() + 1) * OB;
    if (L.scatter) {
      for_patches<F, OB, SCATTER>(b, scratch.channels[k], const_cast<F*>(weights), y, t.PW);
      continue;
    }
    const Gathered& g = scratch.gathered[k];
    for (const Place& p : g.sorted) add_rows<F, OB>(y + int64_t(p.cell) * OB, weights, &g.lists[p.list], p.quads);
  }
}
// Clear what scattered over the edge: to Q, the border is zeros.
template <class F> void clear_border(const Layer<F>& L, const Tile& t, F* y) {
  const int64_t OB = L.OB;
  int64_t last = 0;
  for_rows(t, [&](int cell, int64_t, int) {
    std::fill(y + last * OB, y + cell * OB, F(0));
    last = cell + L.W;
  });
  std::fill(y + last * OB, y + int64_t(t.frames) * t.height() * t.PW * OB, F(0));
}

// ---- pass A: for each channel the mean and the variance of y; and Q ---------------------------------------------------
template <class F, int OB> void add_sums(const Layer<F>& L, const Tile& t, int block, const F* y, double* sums) {
  constexpr int N = OB / LANES<F>;
  Vector<F> first[N], sum[N], squares[N];  // of y - first, which keeps their precision
  const F* y0 = y + int64_t(t.cell(0, t.y0)) * OB;
  for (int v = 0; v < N; v++) first[v] = load(y0 + v * LANES<F>), sum[v] = squares[v] = Vector<F>{};
  for_rows(t, [&, W = L.W](int cell, int64_t, int) {
    for (int x = 0; x < W; x++)
      UNROLL for (int v = 0; v < N; v++) {
        const Vector<F> d = load(y + (cell + x) * int64_t(OB) + v * LANES<F>) - first[v];
        sum[v] += d, squares[v] += d * d;
      }
  });
  if (L.y) for_rows(t, [&](int cell, int64_t n, int row) {
    memcpy(L.y + L.row(block, n, row), y + cell * int64_t(OB), sizeof(F) * L.W * OB);
  });
  const double n = double(t.frames) * (t.y1 - t.y0) * L.W;
  for (int c = 0; c < OB; c++) {
    const double k = y0[c], s = sum[c / LANES<F>][c % LANES<F>], q = squares[c / LANES<F>][c % LANES<F>];
    sums[c] += s + n * k, sums[L.O + c] += q + 2 * k * s + n * k * k;
  }
}
// Q of each branch that has one grows: one copy a thread, or one if split. A branch of values with a kernel has no part
// in y: with T = 1 and y the values of another, Q is a weight's gradient.
template <class F, int OB> void pass_a(const Layer<F>& L, F* mean, F* var) {
  const int64_t images = int64_t(L.T) * L.B, tiles = (images + L.frames - 1) / L.frames, blocks = L.O / OB;
  std::vector<double> sums(2 * L.O * torch::stable::get_num_threads());  // of y and y*y, for each thread
  on_threads(L.split ? blocks : tiles, [&](int64_t id, Share mine) {
    Scratch<F>& scratch = own_scratch(L);
    const Share own_tiles = L.split ? Share{0, tiles} : mine, own = L.split ? mine : Share{0, blocks};
    for (int64_t i = own_tiles.from; i < own_tiles.to; i++) {
      const int64_t first = i * L.frames;
      const int n = min<int64_t>(L.frames, images - first);
      const Tile t = with_border(L, {first, L.B, n, n, 0, L.H, 0, 0, 0});
      scratch.find_spikes(L, t, true);
      for (int block = own.from; block < own.to; block++) {
        F* y = scratch.y;
        currents<F, OB>(L, t, block, scratch);
        add_sums<F, OB>(L, t, block, y, &sums[id * 2 * L.O + block * OB]);
        if (L.scatter || n != scratch.frames) clear_border(L, t, y);
        if (block + 1 == own.to) scratch.frames = n;
        for (int k = 0; k < L.n_branches; k++) {
          const Branch<F>& b = L.branches[k];
          F* Q = b.Q + ((L.split ? 0 : id) * L.O + block * OB) * b.rows();
          if (b.Q && b.values) for_patches<F, OB, REAL>(b, scratch.channels[k], Q, y, t.PW);
          else if (b.Q) for_patches<F, OB, CORRELATE>(b, scratch.channels[k], Q, y, t.PW);
        }
      }
    }
  });
  for (size_t i = 2 * L.O; i < sums.size(); i++) sums[i % (2 * L.O)] += sums[i];
  const double n = double(images) * L.H * L.W;
  for (int c = 0; c < L.O; c++) {
    const double m = sums[c] / n;
    mean[c] = m, var[c] = max(sums[L.O + c] / n - m * m, 0.0);  // a NaN stays
  }
}

// ---- pass B: the neurons fire ------------------------------------------------------------------------------------------
// U = lam*V + kappa*(scale*y + shift); a spike where U >= point; V = U - Vth*s. And the sums over time of y, w*y, s, w*s.
template <class F> struct Firing {
  double lam, kappa, point, Vth, of_y, of_mean, of_repr;  // the last three: factors of the sums of y, s and w*s
  const double* w;                                        // (T)
  const F *scale, *shift;                                 // (O)
  F *y_mean, *y_repr, *mean, *repr;                       // (B, pixel, O); of IF neurons, means are representations
  uint16_t* bits;
};
// G pixels in a row, 16 channels from c on, through all time steps. Their currents are at y + t*y_step + g*OB, their
// words of bits at f.bits[word + t*step + g*words]. far: the sums go past the caches.
template <class F, int OB, int G>
inline void fire(const Firing<F>& f, int T, const F* y, int64_t y_step, int64_t word, int64_t step, int words, int c,
                 bool far) {
  constexpr int L = LANES<F>, PER = WORD / L, N = G * PER;
  const Vector<F> zero{}, lam = zero + F(f.lam), point = zero + F(f.point), Vth = zero + F(f.Vth), one = zero + F(1);
  const F kappa = f.kappa;
  Vector<F> V[N], scale[N], shift[N], ys[N], yw[N], s[N], sw[N];
  UNROLL for (int i = 0; i < N; i++) {
    V[i] = ys[i] = yw[i] = s[i] = sw[i] = zero;
    scale[i] = kappa * load(f.scale + c + i % PER * L), shift[i] = kappa * load(f.shift + c + i % PER * L);
  }
  for (int t = 0; t < T; t++, y += y_step) {
    const Vector<F> w = zero + F(f.w[t]);
    uint32_t bits[G] = {};
    UNROLL for (int i = 0; i < N; i++) {
      const Vector<F> x = load(y + i / PER * OB + i % PER * L), U = lam * V[i] + (scale[i] * x + shift[i]);
      const Mask<F> fired = reached(U, point);
      V[i] = U - where(fired, Vth);
      bits[i / PER] |= bits_of<F>(fired) << i % PER * L;
      ys[i] += x, yw[i] += w * x, s[i] += where(fired, one), sw[i] += where(fired, w);
    }
    UNROLL for (int g = 0; g < G; g++) f.bits[word + t * step + g * words] = bits[g];
  }
  UNROLL for (int i = 0; i < N; i++) {
    const int64_t at = (word + i / PER * words) * WORD + i % PER * L;
    auto put = [=](F* p, Vector<F> v) { far ? stream(p + at, v) : store(p + at, v); };
    put(f.y_mean, ys[i] * F(f.of_y)), put(f.mean, s[i] * F(f.of_mean));
    if (f.y_repr != f.y_mean) put(f.y_repr, yw[i]), put(f.repr, sw[i] * F(f.of_repr));
  }
}
template <class F, int OB> void pass_b(const Layer<F>& L, const Firing<F>& f) {
  constexpr int G = max(1, 4 * LANES<F> / WORD);
  const int64_t strips = (L.H + L.rows - 1) / L.rows, groups = (L.B + L.images - 1) / L.images, blocks = L.O / OB;
  const int64_t words = L.O / WORD, step = int64_t(L.B) * L.H * L.W * words, tiles = groups * strips;
  const auto places = uintptr_t(f.y_mean) | uintptr_t(f.y_repr) | uintptr_t(f.mean) | uintptr_t(f.repr);
  const bool far = step * WORD * int64_t(sizeof(F)) >= FAR && places % BYTES == 0;
  on_threads(L.split ? blocks : tiles, [&](int64_t, Share mine) {
    Scratch<F>& scratch = own_scratch(L);
    const Share own_tiles = L.split ? Share{0, tiles} : mine, own = L.split ? mine : Share{0, blocks};
    for (int64_t i = own_tiles.from; i < own_tiles.to; i++) {
      const int64_t first = i / strips * L.images;
      const int n = min<int64_t>(L.images, L.B - first), y0 = i % strips * L.rows, y1 = min(y0 + L.rows, L.H);
      const Tile t = with_border(L, {first, L.B, L.T * n, n, y0, y1, 0, 0, 0});
      if (!L.y) scratch.find_spikes(L, t, false);
      const int64_t y_step = (L.y ? int64_t(L.W) : int64_t(n) * t.height() * t.PW) * OB;
      for (int64_t block = own.from; block < own.to; block++) {
        if (!L.y) currents<F, OB>(L, t, block, scratch);
        for (int f_ = 0; f_ < n; f_++)
          for (int row = y0; row < y1; row++)
            for (int c = 0; c < OB; c += WORD) {
              const F* y = (L.y ? L.y + L.row(block, first + f_, row) : scratch.y + int64_t(t.cell(f_, row)) * OB) + c;
              const int64_t word = ((first + f_) * L.H + row) * L.W * words + (block * OB + c) / WORD;
              int x = 0;
              for (; x + G <= L.W; x += G)
                fire<F, OB, G>(f, L.T, y + x * OB, y_step, word + x * words, step, words, block * OB + c, far);
              for (; x < L.W; x++)
                fire<F, OB, 1>(f, L.T, y + x * OB, y_step, word + x * words, step, words, block * OB + c, far);
            }
      }
    }
    streamed();
  });
}

// ---- backward: the clamp on representations (collapsed.py has the algebra) ----------------------------------------------
template <class F> struct Clamp {  // G = gain*g where the clamp passes r = scale*y_repr + shift, else 0
  const F *g, *y_repr, *scale, *shift;  // (M, C) and (C)
  double ceiling, gain;
  int64_t M, C, closed;  // closed: r from 0 to the ceiling passes, else r between them
  F low() const { return closed ? 0 : std::numeric_limits<F>::min(); }
  F high() const { return closed ? F(ceiling) : std::nextafter(F(ceiling), F(0)); }
};
template <class F>
void clamp_row(const F* g, const F* y_repr, const F* y_mean, const F* scale, const F* shift, const F* mu, F low, F high,
               F ceiling, int64_t C, F* __restrict S1, F* __restrict S2, F* __restrict above) {
  for (int64_t c = 0; c < C; c++) {
    const F r = scale[c] * y_repr[c] + shift[c], G = (r >= low) & (r <= high) ? g[c] : F(0);
    S1[c] += G, S2[c] += G * (y_mean[c] - mu[c]), above[c] += r > ceiling ? g[c] : F(0);
  }
}
// sums (3, C): of G, of G*(y_mean - mu), and of g above the ceiling
template <class F> void clamp_sums(const Clamp<F>& k, const F* y_mean, const F* mu, F* sums) {
  const int64_t C = k.C;
  std::vector<double> all(3 * C * torch::stable::get_num_threads());  // for each thread
  on_threads(k.M, [&, low = k.low(), high = k.high()](int64_t id, Share mine) {
    std::vector<F> part(3 * C);
    for (int64_t m = mine.from; m < mine.to; m++) {
      clamp_row<F>(k.g + m * C, k.y_repr + m * C, y_mean + m * C, k.scale, k.shift, mu, low, high, k.ceiling, C,
                   &part[0], &part[C], &part[2 * C]);
      if (m % 256 && m + 1 < mine.to) continue;  // float sums of some rows, double sums of these
      for (int64_t i = 0; i < 3 * C; i++) all[id * 3 * C + i] += part[i];
      std::fill(part.begin(), part.end(), F(0));
    }
  });
  for (size_t i = 3 * C; i < all.size(); i++) all[i % (3 * C)] += all[i];
  for (int64_t i = 0; i < 3 * C; i++) sums[i] = all[i] * (i < 2 * C ? k.gain : 1);
}
// constant = times*(a*G + d), and out = a*G + d + c*x, unless x is null
template <class F>
void gradient_row(const F* g, const F* y_repr, const F* scale, const F* shift, F low, F high, F gain, const F* a,
                  const F* d, const F* c, const F* x, F times, int64_t C, F* __restrict constant, F* __restrict out) {
  for (int64_t j = 0; j < C; j++) {
    const F r = scale[j] * y_repr[j] + shift[j], G = (r >= low) & (r <= high) ? gain * g[j] : F(0);
    const F A = a[j] * G + d[j];
    constant[j] = times * A;
    if (x) out[j] = A + c[j] * x[j];
  }
}
template <class F>
void gradient(const Clamp<F>& k, const F* a, const F* d, const F* c, const F* x, double times, F* constant, F* out) {
  const int64_t C = k.C;
  on_threads(k.M, [&, low = k.low(), high = k.high()](int64_t, Share mine) {
    for (int64_t at = mine.from * C; at < mine.to * C; at += C)
      gradient_row<F>(k.g + at, k.y_repr + at, k.scale, k.shift, low, high, k.gain, a, d, c, x ? x + at : x, times,
                      C, constant + at, out + at);
  });
}

// ---- lists of spikes --------------------------------------------------------------------------------------------------------
void count(const uint16_t* bits, int64_t* base, int64_t N, int64_t words) {  // of an image
  on_threads(N, [&](int64_t, Share mine) {
    for (int64_t n = mine.from; n < mine.to; n++) {
      const uint16_t* word = bits + n * words;
      int64_t spikes = 0, i = 0;
      for (uint64_t four; i + 4 <= words; i += 4) memcpy(&four, word + i, 8), spikes += __builtin_popcountll(four);
      for (; i < words; i++) spikes += __builtin_popcount(word[i]);
      base[n + 1] = spikes;
    }
  });
  base[0] = 0;
  for (int64_t n = 0; n < N; n++) base[n + 1] += base[n];
}
// first + the numbers of the bits that are set, and up to a word of others behind them; -> behind the former
#ifdef __AVX512VBMI2__
inline uint16_t* list_word(uint32_t word, uint16_t first, uint16_t* out) {
  const Shorts lanes = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  _mm256_storeu_si256((__m256i*)out, _mm256_maskz_compress_epi16(word, (__m256i)(lanes + first)));
  return out + __builtin_popcount(word);
}
#else
typedef uint16_t Eight __attribute__((vector_size(16), aligned(2), may_alias));
struct OfByte {
  uint16_t numbers[256][8] = {};
  constexpr OfByte() {
    for (int byte = 0; byte < 256; byte++)
      for (int bit = 0, n = 0; bit < 8; bit++)
        if (byte >> bit & 1) numbers[byte][n++] = bit;
  }
};
constexpr OfByte OF_BYTE;
inline uint16_t* list_word(uint32_t word, uint16_t first, uint16_t* out) {
  for (int half = 0; half < 2; half++, word >>= 8, first += 8) {
    *(Eight*)out = *(const Eight*)OF_BYTE.numbers[word & 255] + first;
    out += __builtin_popcount(word & 255);
  }
  return out;
}
#endif
void list(const uint16_t* bits, const int64_t* base, uint32_t* ptr_, uint16_t* active, int64_t N, int64_t H, int64_t W,
          int64_t words) {  // of a pixel
  on_threads(N, [&](int64_t, Share mine) {
    for (int64_t n = mine.from; n < mine.to; n++) {
      const uint16_t* word = bits + n * H * W * words;
      uint32_t* ptr = ptr_ + n * (H * W + 1);
      uint16_t *const begin = active + base[n] + WORD * n, *out = begin;
      for (int64_t y = 0; y < H; y++)
        for (int64_t x = 0; x < W; x++) {
          *ptr++ = out - begin;
          for (int64_t i = 0; i < words; i++) out = list_word(*word++, (x * words + i) * WORD, out);
        }
      *ptr = out - begin;
    }
  });
}
}  // namespace

// ---- what Python calls, for float (f32) and double (f64): 0, or 1 without memory ---------------------------------------------
template <class Body> int done(Body body) {
  try { body(); return 0; } catch (...) { return 1; }
}
#define EXPORT(F, f)                                                                                                  \
  int statistics_##f(const Layer<F>* L, F* mean, F* var) {                                                            \
    return done([&] { L->OB == 32 ? pass_a<F, 32>(*L, mean, var) : pass_a<F, 16>(*L, mean, var); });                  \
  }                                                                                                                   \
  int fire_##f(const Layer<F>* L, const Firing<F>* k) {                                                               \
    return done([&] { L->OB == 32 ? pass_b<F, 32>(*L, *k) : pass_b<F, 16>(*L, *k); });                                \
  }                                                                                                                   \
  int clamp_sums_##f(const Clamp<F>* k, const F* y_mean, const F* mu, F* sums) {                                      \
    return done([&] { clamp_sums(*k, y_mean, mu, sums); });                                                           \
  }                                                                                                                   \
  int gradient_##f(const Clamp<F>* k, const F* a, const F* d, const F* c, const F* x, double times, F* constant, F* out) { \
    return done([&] { gradient(*k, a, d, c, x, times, constant, out); });                                             \
  }
extern "C" {
EXPORT(float, f32)
EXPORT(double, f64)
int count_spikes(const uint16_t* bits, int64_t* base, int64_t N, int64_t words) {
  return done([&] { count(bits, base, N, words); });
}
int list_spikes(const uint16_t* bits, const int64_t* base, uint32_t* ptr, uint16_t* active, int64_t N, int64_t H, int64_t W,
                int64_t words) { return done([&] { list(bits, base, ptr, active, N, H, W, words); }); }
}
