// Compares the kernels with loops that do as the Python reference does, bit for bit, on many shapes; returns how many
// differ. Tests compile it with sanitizers, and without the instruction sets of this CPU.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <limits>
#include <random>
#include <utility>
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
      : positions(chance(0.2) ? 1 : draw(1, chance(0.3) ? 200 : 40)),
        inputs(draw(1, chance(0.05)  ? 3000
                       : chance(0.2) ? 300
                                     : 40)),
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
  const float low = is_float ? (chance(0.5) ? 0 : -infinite) : (chance(0.5) ? 0 : static_cast<float>(draw(1, 200)));
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

// What a kernel sees of images: windows that fit.
Windows draw_windows(int64_t bytes) {
  Windows windows{draw(1, 9), draw(1, 9), bytes, 0, 0, {}, {}, {}, {}};
  for (int i = 0; i < 2; ++i) {
    const int64_t size = i == 0 ? windows.height : windows.width;
    windows.kernel[i] = draw(1, 5);
    windows.stride[i] = draw(1, 3);
    windows.dilation[i] = draw(1, 2);
    const int64_t reach = windows.dilation[i] * (windows.kernel[i] - 1);
    windows.padding[i] = std::max<int64_t>(draw(0, 2), (reach - size + 2) / 2);
    (i == 0 ? windows.out_height : windows.out_width) =
        (size + 2 * windows.padding[i] - reach - 1) / windows.stride[i] + 1;
  }
  return windows;
}

// The level of a channel under a tap of an output position.
uint8_t under(const Bytes& images, const Windows& windows, int64_t out_row, int64_t out_column, int64_t tap,
              int64_t channel, uint8_t fill) {
  const int64_t y = out_row % windows.out_height * windows.stride[0] - windows.padding[0] +
                    tap / windows.kernel[1] * windows.dilation[0];
  const int64_t x = out_column * windows.stride[1] - windows.padding[1] + tap % windows.kernel[1] * windows.dilation[1];
  if (y < 0 || y >= windows.height || x < 0 || x >= windows.width) return fill;
  const int64_t image = out_row / windows.out_height;
  return images[static_cast<size_t>(((image * windows.height + y) * windows.width + x) * windows.bytes + channel)];
}

bool check_windows() {
  const int64_t channels = chance(0.5) ? draw(1, 20) : draw(1, 150), batch = draw(1, 2);
  const Windows windows = draw_windows(channels);
  const auto fill = static_cast<uint8_t>(draw(0, 255));
  const int64_t taps = windows.kernel[0] * windows.kernel[1], rows = batch * windows.out_height, cut = draw(0, rows);
  Bytes images(static_cast<size_t>(batch * windows.height * windows.width * channels));
  for (uint8_t& level : images) level = static_cast<uint8_t>(draw(0, 255));
  std::vector<int8_t> weight(static_cast<size_t>(taps * channels));
  for (int8_t& w : weight) w = static_cast<int8_t>(draw(-127, 127));
  const std::vector<int32_t> offsets(static_cast<size_t>(channels), static_cast<int32_t>(draw(-9999, 9999)));
  std::vector<float> multiplier(static_cast<size_t>(channels)), addend(multiplier.size(), 99.5f);
  for (float& m : multiplier) m = 1e-4f * static_cast<float>(draw(1, 100));
  Bytes table;
  for (int i = 0; i < 256; ++i) table.push_back(static_cast<uint8_t>(draw(0, 255)));
  const bool is_float = chance(0.4), has_table = !is_float && chance(0.5);
  const auto low = static_cast<float>(draw(0, 200));
  const Requantization numbers{
      offsets.data(), multiplier.data(), addend.data(), has_table ? table.data() : nullptr, low, 200};

  const auto outputs = static_cast<size_t>(rows * windows.out_width * channels);
  Bytes patches(outputs * static_cast<size_t>(taps)), got_patches(patches.size()), levels(outputs), got(outputs);
  std::vector<float> floats(outputs), got_floats(outputs);
  size_t place = 0;
  for (int64_t row = 0; row < rows; ++row)
    for (int64_t x = 0; x < windows.out_width; ++x) {
      for (int64_t channel = 0; channel < channels; ++channel) {
        const auto at = static_cast<size_t>((row * windows.out_width + x) * channels + channel);
        int32_t sum = offsets[static_cast<size_t>(channel)];
        for (int64_t tap = 0; tap < taps; ++tap)
          sum += under(images, windows, row, x, tap, channel, fill) *
                 weight[static_cast<size_t>(tap * channels + channel)];
        const float product = static_cast<float>(sum) * multiplier[static_cast<size_t>(channel)];
        floats[at] = std::fmin(std::fmax(product + 99.5f, low), 200);
        levels[at] = static_cast<uint8_t>(std::nearbyint(floats[at]));
        if (has_table) levels[at] = table[levels[at]];
      }
      for (int64_t tap = 0; tap < taps; ++tap)
        for (int64_t channel = 0; channel < channels; ++channel)
          patches[place++] = under(images, windows, row, x, tap, channel, fill);
    }
  const Output output{is_float ? nullptr : got.data(), is_float ? got_floats.data() : nullptr, channels,
                      Layout::channels_last};
  for (const auto& [first, last] : {std::pair{int64_t{0}, cut}, std::pair{cut, rows}}) {
    im2col(images.data(), windows, fill, got_patches.data(), first, last);
    depthwise(images.data(), windows, weight.data(), fill, numbers, output, first, last);
  }
  return got_patches == patches && (is_float ? got_floats == floats : got == levels);
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
  for (int i = 0; i < 200; ++i) failures += !check_windows();
  std::printf("%s: %d of 1000 differ, %.0f GOPS at most\n", kInstructionSet, failures, peak_gops());
  return failures != 0;
}
