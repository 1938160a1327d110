// Runs an AOTInductor package that calls fastops' ops, without Python: example LIBRARY PACKAGE
// LIBRARY is what fastops.op_library() says, libfastops_torch.so. It needs torch's libraries and nothing of Python.
#include <ATen/ops/linspace.h>
#include <dlfcn.h>
#include <torch/csrc/inductor/aoti_package/model_package_loader.h>

#include <cstdio>

int main(int argc, char** argv) {
  if (argc != 3) {
    std::fprintf(stderr, "usage: %s libfastops_torch.so model.pt2\n", argv[0]);
    return 2;
  }
  // The library registers the ops of torch.ops.fastops when it is loaded, which has to be before the package is.
  if (dlopen(argv[1], RTLD_NOW) == nullptr) {
    std::fprintf(stderr, "%s\n", dlerror());
    return 1;
  }
  torch::inductor::AOTIModelPackageLoader model(argv[2]);
  const at::Tensor x = at::linspace(-1, 1, 2 * 3 * 16 * 16).view({2, 3, 16, 16});
  const at::Tensor y = model.run({x})[0].contiguous();
  for (int64_t i = 0; i < y.numel(); ++i) std::printf("%s%.4f", i == 0 ? "" : " ", y.const_data_ptr<float>()[i]);
  std::printf("\n");
  return 0;
}
