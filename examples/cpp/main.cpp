// Run a quantized model in a program without Python: run_model model.pt2 2 32
//
// The package is what torch._inductor.aoti_compile_and_package made of a quantized model (export_model.py). It carries
// fxquant's kernels, so that nothing of fxquant is needed here. The input is ones of the given shape.
#include <ATen/ATen.h>
#include <torch/csrc/inductor/aoti_package/model_package_loader.h>

#include <cstdio>
#include <cstdlib>
#include <exception>
#include <vector>

int main(int count, char **words) {
    if (count < 3) {
        std::fprintf(stderr, "usage: %s model.pt2 size...\n", words[0]);
        return 2;
    }
    std::vector<int64_t> shape;
    for (int i = 2; i < count; i++) shape.push_back(std::atoll(words[i]));
    try {
        torch::inductor::AOTIModelPackageLoader model(words[1]);
        const std::vector<at::Tensor> outputs = model.run({at::ones(shape)});
        const at::Tensor values = outputs[0].contiguous();
        for (int64_t i = 0; i < values.numel(); i++) {
            std::printf("%s%.6f", i ? " " : "", values.data_ptr<float>()[i]);
        }
        std::printf("\n");
    } catch (const std::exception &error) {
        std::fprintf(stderr, "%s\n", error.what());
        return 1;
    }
    return 0;
}
