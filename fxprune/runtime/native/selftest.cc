// Compares the kernels with loops that do as the Python reference does, bit for bit, on many shapes; returns how many
// differ. Tests compile it with sanitizers, and without the instruction sets of this CPU.
#include <cmath>
#include <cstdio>
#include <cstring>
#include <limits>
#include <random>
#include <vector>

#include "kernels.h"
#include "lanes.h"

using namespace fxprune;

namespace {

std::mt19937 generator(0);

int64_t draw(int64_t low, int64_t high) { return std::uniform_int_distribution<int64_t>(low, high)(generator); }
bool chance(double p) { return std::uniform_real_distribution<>(0, 1)(generator) < p; }

// Memory of exactly the size that is needed, so that sanitizers see every step beyond it.
using Bytes = std::vector<uint8_t>;

struct Problem {
  int64_t positions, inputs, outputs;
  int block_rows;
  std::vector<int8_t> values;
  std::vector<int16_t> columns;
  std::vector<int32_t> row_pointers{0};
  std::vector<int32_t> offsets;
  std::vector<float> multiplier, addend;
  Bytes table, input;  // Input channels-last.

  int64_t groups() const { return (inputs + 3) / 4; }

  Problem()
      : positions(draw(1, chance(0.3) ? 200 : 40)),
        inputs(draw(1, chance(0.2) ? 300 : 40)),
        outputs(draw(1, chance(0.2) ? 140 : 20)) {
    block_rows = 1 << draw(0, 2);
    const double density = chance(0.2) ? 0 : chance(0.3) ? 1 : 0.4;
    for (int64_t row = 0; row * block_rows < outputs; ++row) {
      for (int64_t group = 0; group < groups(); ++group)
        if (chance(density)) add_block(row, group);
      row_pointers.push_back(static_cast<int32_t>(columns.size()));
    }
    for (int64_t n = 0; n < outputs; ++n) {
      offsets.push_back(static_cast<int32_t>(draw(-100000, 100000)));
      multiplier.push_back(chance(0.1) ? 1e6f : 1e-3f * static_cast<float>(draw(1, 100)));
      addend.push_back(static_cast<float>(draw(-300, 300)) / 7);
    }
    for (int i = 0; i < 256; ++i) table.push_back(static_cast<uint8_t>(draw(0, 255)));
    for (int64_t i = 0; i < positions * inputs; ++i) input.push_back(static_cast<uint8_t>(draw(0, 255)));
  }

  void add_block(int64_t row, int64_t group) {
    columns.push_back(static_cast<int16_t>(group));
    for (int r = 0; r < block_rows; ++r)
      for (int k = 0; k < 4; ++k)
        values.push_back(
            static_cast<int8_t>(row * block_rows + r < outputs && 4 * group + k < inputs ? draw(-127, 127) : 0));
  }

  int32_t accumulate(int64_t position, int64_t output) const {
    int64_t sum = offsets[static_cast<size_t>(output)];
    const int64_t row = output / block_rows;
    for (int32_t block = row_pointers[static_cast<size_t>(row)]; block < row_pointers[static_cast<size_t>(row) + 1];
         ++block)
      for (int k = 0; k < 4; ++k) {
        const int64_t channel = 4 * columns[static_cast<size_t>(block)] + k;
        if (channel < inputs)
          sum += input[static_cast<size_t>(position * inputs + channel)] *
                 values[static_cast<size_t>((block * block_rows + output % block_rows) * 4 + k)];
      }
    return static_cast<int32_t>(sum);
  }
};

Bytes packed(const Bytes& rows, int64_t positions, int64_t channels) {
  Bytes words(static_cast<size_t>((channels + 3) / 4 * positions * 4), 0);
  for (int64_t p = 0; p < positions; ++p)
    for (int64_t c = 0; c < channels; ++c)
      words[static_cast<size_t>((c / 4 * positions + p) * 4 + c % 4)] = rows[static_cast<size_t>(p * channels + c)];
  return words;
}

// What fills a packed tensor up to whole words means nothing.
void clear_fill(Bytes& words, int64_t positions, int64_t channels) {
  for (int64_t c = channels; c < (channels + 3) / 4 * 4; ++c)
    for (int64_t p = 0; p < positions; ++p) words[static_cast<size_t>((c / 4 * positions + p) * 4 + c % 4)] = 0;
}

bool check_linear() {
  const Problem problem;
  const bool is_float = chance(0.4), has_table = !is_float && chance(0.5);
  const Layout input_layout = chance(0.5) ? Layout::packed : Layout::channels_last;
  const Layout output_layout = !is_float && chance(0.5) ? Layout::packed : Layout::channels_last;
  const float infinite = std::numeric_limits<float>::infinity();
  const float low = is_float ? (chance(0.5) ? 0 : -infinite) : (chance(0.5) ? 0 : 30);
  const float high = is_float ? (chance(0.5) ? 6 : infinite) : (chance(0.5) ? 255 : 200);
  const int64_t m = problem.positions, n = problem.outputs;

  std::vector<float> floats(static_cast<size_t>(m * n)), got_floats(floats.size(), -1);
  Bytes levels(static_cast<size_t>(m * n));
  for (int64_t p = 0; p < m; ++p)
    for (int64_t c = 0; c < n; ++c) {
      const auto channel = static_cast<size_t>(c), place = static_cast<size_t>(p * n + c);
      const float product = static_cast<float>(problem.accumulate(p, c)) * problem.multiplier[channel];
      const float y = std::fmin(std::fmax(product + problem.addend[channel], low), high);
      floats[place] = y;
      const auto level = static_cast<uint8_t>(is_float ? 0 : std::nearbyint(y));
      levels[place] = has_table ? problem.table[level] : level;
    }

  const Bytes input = input_layout == Layout::packed ? packed(problem.input, m, problem.inputs) : problem.input;
  const bool is_packed = output_layout == Layout::packed;
  Bytes got(static_cast<size_t>(is_packed ? (n + 3) / 4 * 4 * m : n * m), 77);
  const Matrix matrix{problem.values.data(), problem.columns.data(), problem.row_pointers.data(),
                      static_cast<int64_t>(problem.columns.size()), problem.block_rows};
  const Requantization numbers{problem.offsets.data(),
                               problem.multiplier.data(),
                               problem.addend.data(),
                               has_table ? problem.table.data() : nullptr,
                               low,
                               high};
  const Output output{is_float ? nullptr : got.data(), is_float ? got_floats.data() : nullptr, n, output_layout};
  // As threads would, in parts.
  const int64_t cut_position = chance(0.5) ? m : draw(0, m) / kPartPositions * kPartPositions;
  const int64_t cut_channel = chance(0.5) ? n : draw(0, n) / kPartChannels * kPartChannels;
  for (const Part& part : {Part{0, cut_position, 0, cut_channel}, Part{0, cut_position, cut_channel, n},
                           Part{cut_position, m, 0, cut_channel}, Part{cut_position, m, cut_channel, n}})
    if (part.first_position < part.last_position && part.first_channel < part.last_channel)
      linear({input.data(), m, input_layout == Layout::packed ? 4 * problem.groups() : problem.inputs, input_layout},
             matrix, numbers, output, part);
  if (is_float) return std::memcmp(floats.data(), got_floats.data(), 4 * floats.size()) == 0;
  if (is_packed) clear_fill(got, m, n);
  return got == (is_packed ? packed(levels, m, n) : levels);
}

bool check_elementwise() {
  const int64_t positions = draw(1, 70), channels = draw(1, 150);
  const auto count = static_cast<size_t>(positions * channels);
  const float scale = 0.01f * static_cast<float>(draw(1, 300));
  const auto zero_point = static_cast<int32_t>(draw(0, 255));
  const bool channels_first = chance(0.5);
  std::vector<float> values(count);
  for (float& x : values) x = chance(0.02) ? std::nanf("") : std::normal_distribution<float>(0, 100)(generator);
  Bytes rows(count);
  std::vector<float> back(count);
  for (int64_t p = 0; p < positions; ++p)
    for (int64_t c = 0; c < channels; ++c) {
      const float x = values[static_cast<size_t>(channels_first ? c * positions + p : p * channels + c)];
      const float level = std::nearbyint(x * (1 / scale)) + static_cast<float>(zero_point);
      const auto place = static_cast<size_t>(p * channels + c);
      rows[place] = static_cast<uint8_t>(std::isnan(level) ? 0 : std::fmin(std::fmax(level, 0), 255));
      back[place] = static_cast<float>(rows[place] - zero_point) * scale;
    }
  const Bytes words = packed(rows, positions, channels);
  const Floats floats{values.data(), positions, channels, channels_first ? 1 : channels,
                      channels_first ? positions : 1};
  const int64_t cut = draw(0, positions) / kPartPositions * kPartPositions;
  bool is_equal = true;
  for (const Layout layout : {Layout::packed, Layout::channels_last}) {
    const bool is_packed = layout == Layout::packed;
    Bytes got(is_packed ? words.size() : rows.size(), 0);
    quantize(floats, 1 / scale, zero_point, got.data(), layout, 0, cut);
    quantize(floats, 1 / scale, zero_point, got.data(), layout, cut, positions);
    if (is_packed) clear_fill(got, positions, channels);
    is_equal &= got == (is_packed ? words : rows);
    std::vector<float> got_back(count);
    const Activations levels{got.data(), positions, is_packed ? (channels + 3) / 4 * 4 : channels, layout};
    dequantize(levels, scale, zero_point, got_back.data(), channels, 0, cut);
    dequantize(levels, scale, zero_point, got_back.data(), channels, cut, positions);
    is_equal &= got_back == back;
  }
  Bytes got_words(words.size(), 0), got_rows(rows.size(), 0);
  pack(rows.data(), positions, channels, got_words.data(), 0, cut);
  pack(rows.data(), positions, channels, got_words.data(), cut, positions);
  unpack(words.data(), positions, channels, got_rows.data(), 0, cut);
  unpack(words.data(), positions, channels, got_rows.data(), cut, positions);
  return is_equal && got_words == words && got_rows == rows;
}

}  // namespace

int main() {
  int failures = 0;
  for (int i = 0; i < 600; ++i) failures += !check_linear();
  for (int i = 0; i < 200; ++i) failures += !check_elementwise();
  std::printf("%s: %d of 800 differ, %.0f GOPS at most\n", kInstructionSet, failures, peak_gops());
  return failures != 0;
}
