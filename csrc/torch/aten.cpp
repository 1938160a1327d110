#include "aten.h"

#include <memory>

#include "binding.h"

namespace fastops {
namespace {

// All three change under the interpreter's lock only.
bool switched_on = false;  // by fastops.enable()
int blocks = 0;            // of fastops.enabled() that somebody is in
std::unique_ptr<aten::Overrides> overrides;

// PyTorch warns, once in a process, of a kernel that takes the place of another. Here that is what was asked for, and a
// warning of someone else's kernel must still come.
class Unwarned {
 public:
  Unwarned() { c10::WarningUtils::set_warnAlways(true); }
  ~Unwarned() { c10::WarningUtils::set_warnAlways(before_); }

 private:
  struct Handler : c10::WarningHandler {
    void process(const c10::Warning&) override {}
  };
  const bool before_ = c10::WarningUtils::get_warnAlways();
  Handler handler_;
  const c10::WarningUtils::WarningHandlerGuard guard_{&handler_};
};

void update() {
  const bool wanted = switched_on || blocks > 0;
  if (!wanted) overrides.reset();
  if (!wanted || overrides != nullptr) return;
  const Unwarned unwarned;
  auto all = std::make_unique<aten::Overrides>();
  aten::override_products(*all);
  aten::override_convolutions(*all);
  aten::override_pools(*all);
  aten::override_activations(*all);
  aten::override_norms(*all);
  aten::override_losses(*all);
  aten::override_attention(*all);
  overrides = std::move(all);
}

}  // namespace

void bind_aten(py::module_& m) {
  m.def("enable", [](bool on) {
    switched_on = on;
    update();
  });
  m.def("enter_enabled", [] {
    ++blocks;
    update();
  });
  m.def("leave_enabled", [] {
    --blocks;
    update();
  });
  m.def("is_enabled", [] { return overrides != nullptr; });
}

}  // namespace fastops
