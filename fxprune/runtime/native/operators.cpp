// The kernels as torch's operators on CPUs: checks what Python gives, makes outputs, shares the work out over threads.
#include <ATen/Parallel.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <algorithm>
#include <string>
#include <vector>

#include "kernels.h"
#include "lanes.h"

namespace fxprune {
namespace {

using at::Tensor;
using Optional = std::optional<Tensor>;
using Text = c10::string_view;

Layout layout_of(Text name) {
  TORCH_CHECK(name == "packed" || name == "channels-last", "unknown layout '", name, "'; known: channels-last, packed");
  return name == "packed" ? Layout::packed : Layout::channels_last;
}

// A contiguous uint8 tensor in a layout, and the sizes of its positions.
struct Levels {
  Tensor tensor;
  Activations activations;
  std::vector<int64_t> positions;

  Levels(const Tensor& input, Layout layout) : tensor(input.contiguous()) {
    TORCH_CHECK(input.scalar_type() == at::kByte, "expected uint8 levels, got ", input.scalar_type());
    const bool is_packed = layout == Layout::packed;
    TORCH_CHECK(input.dim() >= (is_packed ? 2 : 1), "levels of ", input.dim(), " dimensions have no channels");
    TORCH_CHECK(!is_packed || input.size(-1) == 4, "a packed tensor has 4 channels last, not ", input.size(-1));
    const auto sizes = input.sizes();
    positions.assign(sizes.begin() + (is_packed ? 1 : 0), sizes.end() - 1);
    const int64_t channels = is_packed ? 4 * sizes[0] : sizes.back();
    activations = {tensor.const_data_ptr<uint8_t>(), count(), channels, layout};
  }

  int64_t count() const {
    int64_t product = 1;
    for (const int64_t size : positions) product *= size;
    return product;
  }
};

std::vector<int64_t> shape_of(const std::vector<int64_t>& positions, int64_t channels, Layout layout) {
  std::vector<int64_t> shape = positions;
  if (layout == Layout::packed) {
    shape.insert(shape.begin(), (channels + 3) / 4);
    channels = 4;
  }
  shape.push_back(channels);
  return shape;
}

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

template <typename T>
const T* numbers(const Tensor& tensor, int64_t count, const char* name) {
  TORCH_CHECK(tensor.numel() == count && tensor.is_contiguous(), "'", name, "' must hold ", count,
              " numbers side by side, got ", tensor.sizes());
  return tensor.const_data_ptr<T>();
}

Requantization requantization_of(const Tensor& offsets, const Tensor& multiplier, const Tensor& addend,
                                 const Optional& table, double low, double high, int64_t channels) {
  return {numbers<int32_t>(offsets, channels, "offsets"),
          numbers<float>(multiplier, channels, "multiplier"),
          numbers<float>(addend, channels, "addend"),
          table ? numbers<uint8_t>(*table, 256, "table") : nullptr,
          static_cast<float>(low),
          static_cast<float>(high)};
}

Output output_of(Tensor& output, int64_t channels, Layout layout) {
  if (output.scalar_type() == at::kByte) return {output.mutable_data_ptr<uint8_t>(), nullptr, channels, layout};
  TORCH_CHECK(output.scalar_type() == at::kFloat, "outputs are uint8 or float32, not ", output.scalar_type());
  TORCH_CHECK(layout == Layout::channels_last, "float32 is given channels-last only");
  return {nullptr, output.mutable_data_ptr<float>(), channels, layout};
}

// A damaged matrix must not be computed with: its columns and pointers are addresses.
void check(const Matrix& matrix, int64_t columns, int64_t pointers, int64_t rows, int64_t groups) {
  TORCH_CHECK(columns == matrix.blocks, "there are ", matrix.blocks, " blocks and ", columns, " columns");
  TORCH_CHECK(pointers == rows + 1, "there are ", rows, " rows of blocks and ", pointers, " row pointers");
  bool is_ascending = matrix.row_pointers[0] == 0 && matrix.row_pointers[rows] == matrix.blocks;
  for (int64_t row = 0; row < rows; ++row) is_ascending &= matrix.row_pointers[row] <= matrix.row_pointers[row + 1];
  uint16_t most = 0;  // Of negative columns too. A maximum is found many at a time, a comparison is not.
  for (int64_t block = 0; block < matrix.blocks; ++block)
    most = std::max(most, static_cast<uint16_t>(matrix.columns[block]));
  TORCH_CHECK(is_ascending && (matrix.blocks == 0 || most < groups),
              "the columns or row pointers of a block-sparse weight are damaged, or do not fit ", 4 * groups,
              " input features");
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
  const int64_t channels = multiplier.numel(), block_rows = values.size(1), groups = levels.activations.groups();
  TORCH_CHECK(values.dim() == 3 && values.size(2) == 4 && (block_rows == 1 || block_rows == 2 || block_rows == 4),
              "the native backend multiplies blocks of 1x4, 2x4 and 4x4, not values of shape ", values.sizes());
  const Layout layout = layout_of(output_layout);
  const Matrix matrix{numbers<int8_t>(values, values.numel(), "values"),
                      numbers<int16_t>(columns, columns.numel(), "columns"),
                      numbers<int32_t>(row_pointers, row_pointers.numel(), "row_pointers"), values.size(0),
                      static_cast<int>(block_rows)};
  check(matrix, columns.numel(), row_pointers.numel(), (channels + block_rows - 1) / block_rows, groups);
  const Requantization requantization = requantization_of(offsets, multiplier, addend, table, low, high, channels);
  Tensor output = at::empty(shape_of(levels.positions, channels, layout), input.options().dtype(dtype));
  const Output target = output_of(output, channels, layout);
  const int64_t positions = levels.activations.positions;
  share_product(positions, channels, values.numel() * positions,
                [&](const Part& part) { linear(levels.activations, matrix, requantization, target, part); });
  return output;
}

Tensor quantize_floats(const Tensor& input, double scale, int64_t zero_point, Text name) {
  const Layout layout = layout_of(name);
  const Tensor floats = input.scalar_type() == at::kFloat ? input : input.to(at::kFloat);
  const int64_t channels = floats.size(-1), positions = channels ? floats.numel() / channels : 0;
  std::vector<int64_t> sizes(floats.sizes().begin(), floats.sizes().end() - 1);
  Tensor output = at::empty(shape_of(sizes, channels, layout), floats.options().dtype(at::kByte));
  // Positions must be one stride apart; where they are not, a copy is.
  int64_t stride = floats.dim() > 1 ? floats.stride(-2) : channels, expected = stride;
  bool is_regular = true;
  for (int64_t dim = floats.dim() - 2; dim >= 0; --dim) {
    if (floats.size(dim) != 1 && dim == floats.dim() - 2) expected = stride = floats.stride(dim);
    is_regular &= floats.size(dim) == 1 || floats.stride(dim) == expected;
    expected *= floats.size(dim);
  }
  const Tensor regular = is_regular ? floats : floats.contiguous();
  const Floats source{regular.const_data_ptr<float>(), positions, channels, is_regular ? stride : channels,
                      is_regular ? floats.stride(-1) : 1};
  const float inverse = static_cast<float>(1 / scale);
  share_positions(positions, channels, [&](int64_t first, int64_t last) {
    quantize(source, inverse, static_cast<int32_t>(zero_point), output.mutable_data_ptr<uint8_t>(), layout, first,
             last);
  });
  return output;
}

Tensor dequantize_levels(const Tensor& input, double scale, int64_t zero_point, Text name, int64_t channels) {
  const Levels levels(input, layout_of(name));
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
  const int64_t positions = levels.activations.positions;
  Tensor output = at::empty(shape_of(levels.positions, channels, Layout::channels_last), input.options());
  share_positions(positions, channels, [&](int64_t first, int64_t last) {
    unpack(levels.activations.levels, positions, channels, output.mutable_data_ptr<uint8_t>(), first, last);
  });
  return output;
}

// The windows that a kernel takes of images [batch, height, width, channels].
Windows windows_of(const Tensor& images, at::IntArrayRef kernel, at::IntArrayRef stride, at::IntArrayRef padding,
                   at::IntArrayRef dilation) {
  TORCH_CHECK(images.dim() == 4, "expected images [batch, height, width, channels], not ", images.sizes());
  Windows windows{images.size(1),
                  images.size(2),
                  images.size(3) * static_cast<int64_t>(images.element_size()),
                  0,
                  0,
                  {},
                  {},
                  {},
                  {}};
  for (int i = 0; i < 2; ++i) {
    windows.kernel[i] = kernel[i];
    windows.stride[i] = stride[i];
    windows.padding[i] = padding[i];
    windows.dilation[i] = dilation[i];
    const int64_t room = images.size(1 + i) + 2 * padding[i] - dilation[i] * (kernel[i] - 1) - 1;
    TORCH_CHECK(room >= 0, "a kernel of ", kernel, " does not fit images of shape ", images.sizes());
    (i == 0 ? windows.out_height : windows.out_width) = room / stride[i] + 1;
  }
  return windows;
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
  TORCH_CHECK(fill == 0 || input.scalar_type() == at::kByte, "only levels are filled up with anything but 0");
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
  const Tensor images = input.permute({0, 2, 3, 1}).contiguous();
  const Windows windows = windows_of(images, kernel, stride, padding, dilation);
  const int64_t channels = images.size(3), taps = kernel[0] * kernel[1];
  TORCH_CHECK(weight.dim() == 2 && weight.size(0) == taps && weight.size(1) == channels, "expected a weight of shape [",
              taps, ", ", channels, "], got ", weight.sizes());
  const Requantization requantization = requantization_of(offsets, multiplier, addend, table, low, high, channels);
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
