// The last include of every isa_<tier>.cpp: the tier's kernels as one constant table.
constexpr KernelTable kernel_table(const char* isa) {
  return {isa,
          linear_forward_workspace,
          linear_forward,
          linear_forward_name,
          linear_backward_workspace,
          linear_backward,
          linear_backward_name,
          activation_forward,
          activation_backward,
          prelu_forward,
          prelu_backward_workspace,
          prelu_backward,
          glu_forward,
          glu_backward,
          peak_f32,
          peak_bf16};
}
