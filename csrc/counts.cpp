// What choices read and draw, counted in both executors, CUDA's in the emulator: counts FILE ROWS VOCAB, the file of raw
// float32 logits. Prints a line of JSON for each way to sample; bench/counts.py builds and runs it.
#include <cstdlib>

#include "core/philox.h"
#include "cpu/executor.h"
#include "cuda/executor.h"
#include "sanitize.h"

using namespace beagle;

namespace {

struct Way { const char* name; float temperature; int32_t top_k; float top_p, min_p; };
constexpr Way kWays[] = {{"greedy", 0, 0, 1, 0},
                         {"T = 0.7", 0.7f, 0, 1, 0},
                         {"T = 1", 1, 0, 1, 0},
                         {"T = 1, top-p 0.9", 1, 0, 0.9f, 0},
                         {"T = 1, top-p 0.5", 1, 0, 0.5f, 0},
                         {"T = 1, top-k 50", 1, 50, 1, 0},
                         {"T = 0.7, top-k 50, top-p 0.9, min-p 0.05", 0.7f, 50, 0.9f, 0.05f}};

std::vector<float> read(const char* path, size_t count) {
  std::vector<float> values(count);
  std::FILE* file = std::fopen(path, "rb");
  if (!file || std::fread(values.data(), 4, count, file) != count) std::printf("cannot read %s\n", path), std::exit(1);
  std::fclose(file);
  return values;
}

std::vector<int64_t> choose(const std::vector<float>& z, int64_t rows, int64_t vocab, const Way& way, bool cuda) {
  const int64_t chunks = cuda ? (vocab + kChunk - 1) / kChunk : 1;
  std::vector<int64_t> seed(rows, 0), positions, tokens(rows);
  for (int64_t row = 0; row < rows; ++row) positions.push_back(row);
  const std::vector<float> temperature(rows, way.temperature), top_p(rows, way.top_p), min_p(rows, way.min_p);
  const std::vector<int32_t> top_k(rows, way.top_k);
  std::vector<uint64_t> keys(rows * chunks);
  std::vector<int32_t> flags(rows * chunks), status(rows);
  std::vector<float> groups(rows * (chunks * kChunk / 32 + 2 * kRowWords));
  const ChooseTokens op{z.data(), kFloat32, rows, vocab, vocab, positions.data(),
                        {seed.data(), temperature.data(), top_k.data(), top_p.data(), min_p.data()}, kTarget, nullptr,
                        keys.data(), flags.data(), groups.data(), chunks, tokens.data(), status.data()};
  emulator::reset_counts();
  if (cuda) cuda::choose_tokens(op, nullptr);
  else cpu::choose_tokens(op, 1);
  const double all = double(rows) * double(vocab), every = double(rows) * double((vocab + kGroup - 1) / kGroup);
  std::printf("{\"executor\": \"%s\", \"sampling\": \"%s\", \"reads_per_token\": %.4f, \"philox_calls_per_group\": %.4f, "
              "\"share_of_groups_looked_into\": %.5f}\n", cuda ? "cuda" : "cpu", way.name,
              double(emulator::counted(emulator::kLogits)) / all, double(emulator::counted(emulator::kPhilox)) / every,
              double(emulator::counted(emulator::kLooks)) / every);
  return tokens;
}

}  // namespace

int main(int count, char** given) {
  if (count != 4) return std::printf("counts FILE ROWS VOCAB\n"), 1;
  const int64_t rows = std::atoll(given[2]), vocab = std::atoll(given[3]);
  const std::vector<float> z = read(given[1], size_t(rows * vocab));
  for (const Way& way : kWays) same(way.name, choose(z, rows, vocab, way, false), choose(z, rows, vocab, way, true));
}
