// Rows quantised to int8 times a weight in int8: exact sums of a group's products, scaled and added in fp32 in the
// order of the groups, alike to the bit on every instruction set (beagle_kernels/reference/int8_linear.py).
#include "products.h"

#include "int8_lanes.h"

namespace beagle::cpu::BEAGLE_ISA {
namespace {

// Below, the reciprocal of a group's scale would not be finite: such a group counts as zeros.
constexpr float kLeast = 0x1p-100f;

// Rows of x are multiplied by tiles of nearly equal height, at most kMost.
BEAGLE_FN int64_t tiles_of(int64_t rows) { return (rows + kMost - 1) / kMost; }
BEAGLE_FN int64_t height_of(int64_t rows, int64_t tile) {
  const int64_t tiles = tiles_of(rows);
  return rows / tiles + (tile < rows % tiles);
}

// A tile of x: elements by quads of each row in turn, then each group's scales, and what the sums of its products begin
// with, of each row in turn.
struct Tile {
  char* x;
  int64_t height, width, groups;
  BEAGLE_FN Element* elements() const { return reinterpret_cast<Element*>(x); }
  BEAGLE_FN float* scales() const { return reinterpret_cast<float*>(elements() + height * width); }
  BEAGLE_FN int32_t* starts() const { return reinterpret_cast<int32_t*>(scales() + height * groups); }
  BEAGLE_FN int64_t bytes() const {
    return (height * (width * int64_t(sizeof(Element)) + 8 * groups) + 63) / 64 * 64;
  }
};

BEAGLE_FN Tile first_tile(const void* x, int64_t rows, int64_t width, int64_t group) {
  return {static_cast<char*>(const_cast<void*>(x)), rows ? height_of(rows, 0) : 0, width, group ? width / group : 0};
}
BEAGLE_FN Tile next_tile(const Tile& tile, int64_t rows, int64_t number) {
  return {tile.x + tile.bytes(), height_of(rows, number), tile.width, tile.groups};
}

int64_t prepared(int64_t rows, int64_t width, int64_t group) {
  int64_t bytes = 0;
  Tile tile = first_tile(nullptr, rows, width, group);
  for (int64_t i = 0; i < tiles_of(rows); ++i) {
    if (i) tile = next_tile(tile, rows, i);
    bytes += tile.bytes();
  }
  return bytes;
}

// 32 elements of a row, rounded to the nearest, ties to even; returns their sum.
BEAGLE_FN int32_t quantise(const float* x, float inverse, int64_t height, Element* to) {
  // what a float plus 3 * 2^22 is, is an integer in its low bits
  constexpr float kShift = 12582912.0f;
  Element quads[32];
  int32_t sum = 0;
  for (int k = 0; k < 32; ++k) {
    const int32_t value = bit_cast<int32_t>(x[k] * inverse + kShift) - bit_cast<int32_t>(kShift);
    quads[place(k)] = Element(value);
    sum += value;
  }
  for (int q = 0; q < 8; ++q) __builtin_memcpy(to + q * 4 * height, quads + 4 * q, 4 * sizeof(Element));
  return sum;
}

// A row of a tile.
BEAGLE_FN void fill(const float* x, int64_t group, const Tile& tile, int64_t row) {
  for (int64_t g = 0; g < tile.groups; ++g, x += group) {
    int32_t bits = 0, sum = 0;
    for (int64_t k = 0; k < group; ++k) bits = most(bits, bit_cast<int32_t>(x[k]) & 0x7fffffff);
    const float largest = bit_cast<float>(bits);
    const bool usual = largest >= kLeast && largest <= kMax;
    // a group that is not finite makes its row NaN by the scale alone
    const float scale = usual ? largest / 127.0f : largest < kLeast ? 0.0f : __builtin_nanf("");
    const float inverse = 127.0f / largest;
    for (int64_t k = 0; k < group; k += 32) {
      const float none[32] = {};
      Element* to = tile.elements() + (g * group + k) * tile.height + 4 * row;
      sum += quantise(usual ? x + k : none, usual ? inverse : 0.0f, tile.height, to);
    }
    tile.scales()[g * tile.height + row] = scale;
    tile.starts()[g * tile.height + row] = kOffset * sum;
  }
}

void prepare(const float* x, int64_t stride, int64_t rows, int64_t width, int64_t group, void* to) {
  Tile tile = first_tile(to, rows, width, group);
  for (int64_t i = 0; i < tiles_of(rows); ++i) {
    if (i) tile = next_tile(tile, rows, i);
    for (int64_t row = 0; row < tile.height; ++row, x += stride) fill(x, group, tile, row);
  }
}

#if defined(BEAGLE_LANES)
using Vec = Floats<kLanes>;

// kLanes weight rows, the last one repeated where fewer are left, and their scales.
struct Panel {
  const int8_t* rows[kLanes];
  int64_t width, group, ahead;  // elements to the next panel
  float* scales;                // [width / group, kLanes]
  char *half, *quads;           // the elements, a row a lane: all, or kStep of them and the next kStep
  bool keep;
};

BEAGLE_FN Panel panel_of(const Weight& weight, int64_t n, int64_t count, bool keep, float* spare) {
  Panel panel{{}, weight.width, weight.group, kLanes * weight.stride, spare, nullptr, nullptr, keep};
  const int64_t groups = weight.width / weight.group;
  panel.half = reinterpret_cast<char*>(spare + kLanes * groups), panel.quads = panel.half + kHalfBytes;
  for (int64_t j = 0; j < kLanes; ++j) {
    const int64_t at = n + least(j, count - 1);
    panel.rows[j] = static_cast<const int8_t*>(weight.rows) + at * weight.stride;
    for (int64_t g = 0; g < groups; ++g) spare[g * kLanes + j] = weight.scales[at * groups + g];
  }
  return panel;
}

// kRows rows of x times a panel, kStep elements at a time. The first tile reads the weight: each part of the products
// takes turns with a part of the next elements' transposition, and with asking for those of the next panel.
template <int kRows, int kStep, bool kReads>
struct Work {
  static constexpr int kChains = kRows == 1 ? 4 : kRows == 2 ? 2 : 1;  // enough to hide the instruction's latency
  const Panel& panel;
  Ints total[kRows][kChains];
  BEAGLE_FN explicit Work(const Panel& panel) : panel(panel) {}

  BEAGLE_FN char* quads(int64_t k) const { return panel.quads + (panel.keep ? k : k & kStep) * kLanes; }

  template <int kPart>
  BEAGLE_FN void part(int64_t k, int64_t next, const Element* x, const char* from, char* to) {
    if constexpr (kReads) {
      transpose_part<kStep, kPart>(panel.rows, next, panel.half, to);
      for (int j = 2 * kPart; j < 2 * kPart + 2; ++j) __builtin_prefetch(panel.rows[j] + panel.ahead + k, 0, 2);
    }
    constexpr int kQuads = kStep / 4 / kParts;
#pragma GCC unroll 2
    for (int q = kPart * kQuads; q < (kPart + 1) * kQuads; ++q) {
      const Quads w(from + q * 4 * kLanes);
#pragma GCC unroll 8
      for (int i = 0; i < kRows; ++i) total[i][q % kChains] = w.add_to(total[i][q % kChains], x + 4 * (q * kRows + i));
    }
  }
  template <int... kPart>
  BEAGLE_FN void parts(int64_t k, const Element* x, std::integer_sequence<int, kPart...>) {
    const int64_t next = least(k + kStep, panel.width - kStep);
    const char* from = quads(k);
    char* to = quads(k + kStep);
    (part<kPart>(k, next, x, from, to), ...);
  }

  BEAGLE_FN void run(const Tile& tile, Vec* sums) {
    constexpr std::make_integer_sequence<int, kParts> kAll{};
    if (kReads) transpose<kStep>(panel.rows, 0, panel.half, quads(0), kAll);
    const Element* x = tile.elements();
    const float *x_scales = tile.scales(), *scales = panel.scales;
    const int32_t* starts = tile.starts();
    Vec sum[kRows];
    for (int i = 0; i < kRows; ++i) sum[i] = Vec{};
    for (int64_t k = 0; k < panel.width; x_scales += kRows, starts += kRows, scales += kLanes) {
      for (int i = 0; i < kRows; ++i)
        for (int c = 0; c < kChains; ++c) total[i][c] = all(c ? 0 : starts[i]);
      for (const int64_t end = k + panel.group; k < end; k += kStep, x += kStep * kRows) parts(k, x, kAll);
      const Vec scale = *reinterpret_cast<const Vec*>(scales);
      for (int i = 0; i < kRows; ++i) {
        for (int c = 1; c < kChains; ++c) total[i][0] = added(total[i][0], total[i][c]);
        sum[i] += floats(total[i][0]) * (x_scales[i] * scale);
      }
    }
    for (int i = 0; i < kRows; ++i) sums[i] = sum[i];
  }
};

template <int kRows, int kStep, bool kReads>
BEAGLE_OWN void work(const Panel& panel, const Tile& tile, Vec* sums) {
  Work<kRows, kStep, kReads>(panel).run(tile, sums);
}

// By a tile's height and by whether it is the panel's first.
struct Works {
  void (*of[kMost][2])(const Panel& panel, const Tile& tile, Vec* sums);
};
template <int kStep, int... kRows>
constexpr Works works(std::integer_sequence<int, kRows...>) {
  return {{{work<kRows + 1, kStep, false>, work<kRows + 1, kStep, true>}...}};
}

template <int kStep>
void multiply_by(const Weight& weight, const void* x, int64_t rows, int64_t first, int64_t last, float* out,
                 int64_t out_stride, float* spare) {
  static constexpr Works kWorks = works<kStep>(std::make_integer_sequence<int, kMost>());
  for (int64_t n = first; n < last; n += kLanes) {
    const int64_t count = least<int64_t>(kLanes, last - n);
    const Panel panel = panel_of(weight, n, count, rows > kMost, spare);
    float* to = out + n - first;
    Tile tile = first_tile(x, rows, weight.width, weight.group);
    for (int64_t i = 0; i < tiles_of(rows); ++i) {
      if (i) tile = next_tile(tile, rows, i);
      Vec sums[kMost];
      kWorks.of[tile.height - 1][i == 0](panel, tile, sums);
      for (int64_t r = 0; r < tile.height; ++r, to += out_stride) __builtin_memcpy(to, &sums[r], count * sizeof(float));
    }
  }
}

void multiply(const Weight& weight, const void* x, int64_t rows, int64_t first, int64_t last, float* out,
              int64_t out_stride, float* spare) {
  const auto by = weight.group % (4 * kLanes) ? multiply_by<32> : multiply_by<4 * kLanes>;
  alignas(64) float enough[kPanel * 64];
  if (weight.width < 64) spare = enough;  // of one row of quads and the next, spare has room from there on
  if (weight.width) by(weight, x, rows, first, last, out, out_stride, spare);
  else for (int64_t m = 0; m < rows; ++m) for (int64_t n = first; n < last; ++n) out[m * out_stride + n - first] = 0.0f;
}

#else

void multiply(const Weight& weight, const void* x, int64_t rows, int64_t first, int64_t last, float* out,
              int64_t out_stride, float*) {
  for (int64_t n = first; n < last; ++n) {
    const int8_t* w = static_cast<const int8_t*>(weight.rows) + n * weight.stride;
    Tile row = first_tile(x, rows, weight.width, weight.group);
    for (int64_t m = 0; m < rows; ++m) {
      if (m) row = next_tile(row, rows, m);
      float sum = 0.0f;
      for (int64_t g = 0; g < row.groups; ++g) {
        int32_t total = 0;
        for (int64_t k = g * weight.group; k < (g + 1) * weight.group; ++k) total += int32_t(w[k]) * row.elements()[k];
        sum += float(total) * (row.scales()[g] * weight.scales[n * row.groups + g]);
      }
      out[m * out_stride + n - first] = sum;
    }
  }
}
#endif

}  // namespace

extern const Product kInt8Product;
const Product kInt8Product = {prepared, prepare, multiply};

}  // namespace beagle::cpu::BEAGLE_ISA
