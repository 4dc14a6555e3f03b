// Opens the ONNX file of a bundle with OpenVINO and computes logits.
//
//     classify BUNDLE INPUT OUTPUT [f32|bf16]
//
// INPUT holds preprocessed images, float32 (N, 3, H, W) in the machine's byte order, as Predictor.prepare gives
// them. OUTPUT gets the logits, float32 (N, classes). The last word is the precision in which float operations
// are computed; f32 is the default. One line an image on standard output: its number, its best class, the logit.

#include <algorithm>
#include <fstream>
#include <iostream>
#include <iterator>
#include <stdexcept>
#include <string>
#include <vector>

#include <openvino/openvino.hpp>

namespace {

std::vector<char> read_bytes(const std::string& path) {
    std::ifstream file(path, std::ios::binary);
    if (!file) {
        throw std::runtime_error("cannot read " + path);
    }
    return {std::istreambuf_iterator<char>(file), std::istreambuf_iterator<char>()};
}

void write_floats(const std::string& path, const std::vector<float>& values) {
    std::ofstream file(path, std::ios::binary);
    const auto size = static_cast<std::streamsize>(values.size() * sizeof(float));
    file.write(reinterpret_cast<const char*>(values.data()), size);
    file.close();
    if (!file) {
        throw std::runtime_error("cannot write " + path);
    }
}

ov::element::Type parse_precision(const std::string& name) {
    if (name == "f32") {
        return ov::element::f32;
    }
    if (name == "bf16") {
        return ov::element::bf16;
    }
    throw std::runtime_error("unknown precision " + name + ": give f32 or bf16");
}

// The model, compiled as Predictor does it for one image at a time.
ov::CompiledModel compile(ov::Core& core, const std::string& bundle, ov::element::Type precision) {
    const auto model = core.read_model(bundle + "/model.onnx");
    if (model->inputs().size() != 1 || model->is_dynamic()) {
        throw std::runtime_error("this program takes one input of a fixed shape: export without --batch 0");
    }
    return core.compile_model(model, "CPU", ov::hint::performance_mode(ov::hint::PerformanceMode::LATENCY),
                              ov::hint::inference_precision(precision));
}

// Runs every image of the input, a batch of the model at a time.
std::vector<float> compute_logits(ov::CompiledModel& model, std::vector<char>& input) {
    const auto shape = model.input().get_shape();
    const size_t batch_bytes = ov::shape_size(shape) * sizeof(float);
    if (input.empty() || input.size() % batch_bytes != 0) {
        throw std::runtime_error("the input has " + std::to_string(input.size()) + " bytes, and no multiple of " +
                                 std::to_string(batch_bytes));
    }
    auto request = model.create_infer_request();
    std::vector<float> logits;
    for (size_t offset = 0; offset < input.size(); offset += batch_bytes) {
        ov::Tensor tensor(ov::element::f32, shape);
        std::copy_n(input.data() + offset, batch_bytes, static_cast<char*>(tensor.data()));
        request.set_input_tensor(tensor);
        request.infer();
        const auto output = request.get_output_tensor(0);
        logits.insert(logits.end(), output.data<float>(), output.data<float>() + output.get_size());
    }
    return logits;
}

void print_best(const std::vector<float>& logits, size_t classes) {
    for (size_t first = 0; first < logits.size(); first += classes) {
        const auto begin = logits.begin() + static_cast<std::ptrdiff_t>(first);
        const auto best = std::max_element(begin, begin + static_cast<std::ptrdiff_t>(classes));
        std::cout << first / classes << " " << best - begin << " " << *best << "\n";
    }
}

}  // namespace

int main(int count, char** words) {
    if (count < 4 || count > 5) {
        std::cerr << "usage: classify BUNDLE INPUT OUTPUT [f32|bf16]\n";
        return 2;
    }
    try {
        ov::Core core;
        auto model = compile(core, words[1], parse_precision(count == 5 ? words[4] : "f32"));
        auto input = read_bytes(words[2]);
        const auto logits = compute_logits(model, input);
        write_floats(words[3], logits);
        print_best(logits, model.output(0).get_shape().back());
    } catch (const std::exception& error) {
        std::cerr << "error: " << error.what() << "\n";
        return 2;
    }
    return 0;
}
