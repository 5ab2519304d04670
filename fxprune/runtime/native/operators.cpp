// The kernels as torch's operators on CPUs: makes outputs and shares the work out over threads.
#include <ATen/Parallel.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <algorithm>
#include <vector>

#include "arguments.h"
#include "kernels.h"
#include "lanes.h"

namespace fxprune {
namespace {

// Call `work(first, last)` for ranges of positions, on as many threads as torch has.
template <typename Work>
void share_positions(int64_t positions, int64_t channels, const Work& work) {
  constexpr int64_t kGrain = 1 << 15;  // Elements that are worth another thread.
  const int64_t least = std::max<int64_t>(kPartPositions, kGrain / std::max<int64_t>(channels, 1));
  at::parallel_for(
      0, (positions + kPartPositions - 1) / kPartPositions, std::max<int64_t>(least / kPartPositions, 1),
      [&](int64_t first, int64_t last) { work(first * kPartPositions, std::min(last * kPartPositions, positions)); });
}

// Share a product out: by positions where there are enough for every thread, else by output channels.
template <typename Work>
void share_product(int64_t positions, int64_t channels, int64_t operations, const Work& work) {
  constexpr int64_t kWorth = 1 << 19;  // Multiplications that are worth another thread: about a microsecond.
  const int64_t threads = std::min<int64_t>(at::get_num_threads(), std::max<int64_t>(operations / kWorth, 1));
  if (threads == 1) return work(Part{0, positions, 0, channels});
  const bool by_positions = positions >= 8 * kPartPositions * threads;
  const int64_t unit = by_positions ? kPartPositions : kPartChannels;
  const int64_t units = ((by_positions ? positions : channels) + unit - 1) / unit;
  at::parallel_for(0, units, (units + threads - 1) / threads, [&](int64_t first, int64_t last) {
    first *= unit;
    last *= unit;
    work(by_positions ? Part{first, std::min(last, positions), 0, channels}
                      : Part{0, positions, first, std::min(last, channels)});
  });
}

using Signature = Tensor(const Tensor&, const Tensor&, const Tensor&, const Tensor&, const Tensor&, const Tensor&,
                         const Tensor&, const Optional&, double, double, at::ScalarType, Text, Text, Text);

Tensor block_sparse_int8_linear(const Tensor& input, const Tensor& values, const Tensor& columns,
                                const Tensor& row_pointers, const Tensor& offsets, const Tensor& multiplier,
                                const Tensor& addend, const Optional& table, double low, double high,
                                at::ScalarType dtype, Text input_layout, Text output_layout, Text backend) {
  if (backend != "native") {
    static const auto by_name = c10::Dispatcher::singleton()
                                    .findSchemaOrThrow("fxprune::block_sparse_int8_linear_by_name", "")
                                    .typed<Signature>();
    return by_name.call(input, values, columns, row_pointers, offsets, multiplier, addend, table, low, high, dtype,
                        input_layout, output_layout, backend);
  }
  const Levels levels(input, layout_of(input_layout));
  const int64_t channels = multiplier.numel(), block_rows = values.dim() == 3 ? values.size(1) : 0;
  TORCH_CHECK((block_rows == 1 || block_rows == 2 || block_rows == 4) && values.size(2) == 4,
              "the native backend multiplies blocks of 1x4, 2x4 and 4x4, not values of shape ", values.sizes());
  const Layout layout = layout_of(output_layout);
  const Matrix matrix{numbers<int8_t>(values, values.numel(), "values"),
                      numbers<int16_t>(columns, columns.numel(), "columns"),
                      numbers<int32_t>(row_pointers, row_pointers.numel(), "row_pointers"), values.size(0),
                      static_cast<int>(block_rows)};
  check(matrix, columns.numel(), row_pointers.numel(), (channels + block_rows - 1) / block_rows,
        levels.activations.groups());
  const Requantization requantization =
      requantization_of(offsets, multiplier, addend, table, low, high, dtype, channels);
  Tensor output = at::empty(shape_of(levels.positions, channels, layout), input.options().dtype(dtype));
  const Output target = output_of(output, channels, layout);
  const int64_t positions = levels.activations.positions;
  share_product(positions, channels, values.numel() * positions,
                [&](const Part& part) { linear(levels.activations, matrix, requantization, target, part); });
  return output;
}

Tensor quantize_floats(const Tensor& input, double scale, int64_t zero_point, Text name) {
  const Layout layout = layout_of(name);
  TORCH_CHECK_VALUE(input.dim() >= 1, "a number without dimensions has no channels");
  const Tensor given = input.to(at::kFloat);
  const Tensor floats = position_stride(given) ? given : given.contiguous();
  const int64_t channels = floats.size(-1), positions = channels ? floats.numel() / channels : 0;
  const std::vector<int64_t> sizes(floats.sizes().begin(), floats.sizes().end() - 1);
  Tensor output = at::empty(shape_of(sizes, channels, layout), floats.options().dtype(at::kByte));
  const Floats source{floats.const_data_ptr<float>(), positions, channels, *position_stride(floats), floats.stride(-1)};
  const float inverse = static_cast<float>(1 / scale);
  share_positions(positions, channels, [&](int64_t first, int64_t last) {
    quantize(source, inverse, static_cast<int32_t>(zero_point), output.mutable_data_ptr<uint8_t>(), layout, first,
             last);
  });
  return output;
}

Tensor dequantize_levels(const Tensor& input, double scale, int64_t zero_point, Text name, int64_t channels) {
  const Levels levels(input, layout_of(name));
  levels.check_has(channels);
  Tensor output =
      at::empty(shape_of(levels.positions, channels, Layout::channels_last), input.options().dtype(at::kFloat));
  share_positions(levels.activations.positions, channels, [&](int64_t first, int64_t last) {
    dequantize(levels.activations, static_cast<float>(scale), static_cast<int32_t>(zero_point),
               output.mutable_data_ptr<float>(), channels, first, last);
  });
  return output;
}

Tensor pack_levels(const Tensor& input) {
  const Levels levels(input, Layout::channels_last);
  const int64_t channels = levels.activations.channels, positions = levels.activations.positions;
  Tensor output = at::empty(shape_of(levels.positions, channels, Layout::packed), input.options());
  share_positions(positions, channels, [&](int64_t first, int64_t last) {
    pack(levels.activations.levels, positions, channels, output.mutable_data_ptr<uint8_t>(), first, last);
  });
  return output;
}

Tensor unpack_levels(const Tensor& input, int64_t channels) {
  const Levels levels(input, Layout::packed);
  levels.check_has(channels);
  const int64_t positions = levels.activations.positions;
  Tensor output = at::empty(shape_of(levels.positions, channels, Layout::channels_last), input.options());
  share_positions(positions, channels, [&](int64_t first, int64_t last) {
    unpack(levels.activations.levels, positions, channels, output.mutable_data_ptr<uint8_t>(), first, last);
  });
  return output;
}

// Call `work(first, last)` for ranges of the output rows of all images, each of which costs `operations`.
template <typename Work>
void share_rows(int64_t batch, const Windows& windows, int64_t operations, const Work& work) {
  constexpr int64_t kGrain = 1 << 17;
  at::parallel_for(0, batch * windows.out_height, std::max<int64_t>(1, kGrain / std::max<int64_t>(operations, 1)),
                   work);
}

Tensor im2col_rows(const Tensor& input, at::IntArrayRef kernel, at::IntArrayRef stride, at::IntArrayRef padding,
                   at::IntArrayRef dilation, int64_t fill) {
  TORCH_CHECK_VALUE(fill == 0 || input.scalar_type() == at::kByte, "only levels are filled up with anything but 0");
  const Tensor images = input.contiguous();
  const Windows windows = windows_of(images, kernel, stride, padding, dilation);
  const int64_t taps = kernel[0] * kernel[1];
  Tensor output =
      at::empty({images.size(0), windows.out_height, windows.out_width, taps * images.size(3)}, images.options());
  const auto* source = static_cast<const uint8_t*>(images.const_data_ptr());
  auto* target = static_cast<uint8_t*>(output.mutable_data_ptr());
  share_rows(images.size(0), windows, windows.out_width * taps * windows.bytes, [&](int64_t first, int64_t last) {
    im2col(source, windows, static_cast<uint8_t>(fill), target, first, last);
  });
  return output;
}

Tensor depthwise_int8_conv2d(const Tensor& input, const Tensor& weight, const Tensor& offsets, const Tensor& multiplier,
                             const Tensor& addend, const Optional& table, double low, double high, at::ScalarType dtype,
                             at::IntArrayRef kernel, at::IntArrayRef stride, at::IntArrayRef padding,
                             at::IntArrayRef dilation, int64_t fill) {
  TORCH_CHECK(input.scalar_type() == at::kByte, "expected uint8 levels, got ", input.scalar_type());
  TORCH_CHECK_VALUE(input.dim() == 4, "expected images [batch, channels, height, width], not ", input.sizes());
  const Tensor images = input.permute({0, 2, 3, 1}).contiguous();
  const Windows windows = windows_of(images, kernel, stride, padding, dilation);
  const int64_t channels = images.size(3), taps = kernel[0] * kernel[1];
  TORCH_CHECK(weight.dim() == 2 && weight.size(0) == taps && weight.size(1) == channels, "expected a weight of shape [",
              taps, ", ", channels, "], got ", weight.sizes());
  const Requantization requantization =
      requantization_of(offsets, multiplier, addend, table, low, high, dtype, channels);
  Tensor output =
      at::empty({images.size(0), windows.out_height, windows.out_width, channels}, images.options().dtype(dtype));
  const Output target = output_of(output, channels, Layout::channels_last);
  const auto* source = images.const_data_ptr<uint8_t>();
  const auto* weights = numbers<int8_t>(weight, taps * channels, "weight");
  share_rows(images.size(0), windows, windows.out_width * taps * channels, [&](int64_t first, int64_t last) {
    depthwise(source, windows, weights, static_cast<uint8_t>(fill), requantization, target, first, last);
  });
  return output.permute({0, 3, 1, 2});
}

}  // namespace

TORCH_LIBRARY_IMPL(fxprune, CPU, library) {
  library.impl("block_sparse_int8_linear", block_sparse_int8_linear);
  library.impl("quantize", quantize_floats);
  library.impl("dequantize", dequantize_levels);
  library.impl("pack", pack_levels);
  library.impl("unpack", unpack_levels);
  library.impl("im2col", im2col_rows);
  library.impl("depthwise_int8_conv2d", depthwise_int8_conv2d);
}

}  // namespace fxprune

extern "C" const char* fxprune_instruction_set() { return fxprune::kInstructionSet; }
extern "C" double fxprune_peak_gops() { return fxprune::peak_gops(); }
