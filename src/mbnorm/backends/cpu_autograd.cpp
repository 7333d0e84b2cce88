// The operators that normalize as differentiable ones: their node of autograd. This file alone needs more than
// torch's stable ABI; in Python the node would take longer than the kernels do on small maps.

#undef TORCH_TARGET_VERSION

#include <torch/csrc/autograd/function.h>
#include <torch/csrc/autograd/graph_task.h>
#include <torch/csrc/autograd/saved_variable.h>
#include <torch/library.h>

#include <mutex>
#include <unordered_map>

namespace {

using torch::autograd::Node;
using torch::autograd::SavedVariable;
using torch::autograd::variable_list;

using NodePointer = decltype(torch::autograd::Edge::function);

// Torch 2.13 counts the references to a node inside it, older versions outside.
template <class Pointer>
Pointer owned(auto* node) {
  if constexpr (requires { Pointer::unsafe_steal_from_new(node); })
    return Pointer::unsafe_steal_from_new(node);
  else
    return Pointer(node, [](auto* n) { deleteNode(n); });
}

c10::OperatorHandle operator_named(const char* name) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(name, "");
}

// Which node a record belongs to, as long as that lives.
class Nodes {
 public:
  void add(const at::Tensor& record, const Node* node) {
    const std::lock_guard lock(mutex_);
    of_[record.unsafeGetTensorImpl()] = node;
  }
  void remove(const at::Tensor& record) {
    const std::lock_guard lock(mutex_);
    of_.erase(record.unsafeGetTensorImpl());
  }
  const Node* find(const at::Tensor& record) {
    const std::lock_guard lock(mutex_);
    const auto found = of_.find(record.unsafeGetTensorImpl());
    return found == of_.end() ? nullptr : found->second;
  }

 private:
  std::mutex mutex_;
  std::unordered_map<const c10::TensorImpl*, const Node*> of_;
};

Nodes& nodes() {
  static Nodes* all = new Nodes;  // nodes may outlive static objects
  return *all;
}

class Normalization : public Node {
 public:
  Normalization(const at::Tensor& x, const at::Tensor& weight, const at::Tensor& bias, bool pooled, double eps)
      : x_(x, false), weight_(weight, false), bias_(bias, false), pooled_(pooled), eps_(eps) {}
  ~Normalization() override {
    if (record_.defined()) nodes().remove(record_);
  }

  // Take the record of the forward.
  void take(at::Tensor record) {
    record_ = std::move(record);
    nodes().add(record_, this);
  }

  std::string name() const override { return "BlendedBatchNormBackward"; }

  void release_variables() override {
    const std::lock_guard lock(mutex_);
    x_.reset_data();
    weight_.reset_data();
    bias_.reset_data();
  }

  variable_list apply(variable_list&& gradients) override {
    const std::lock_guard lock(mutex_);
    // the layer counts the passes by the version of the record
    record_.unsafeGetTensorImpl()->bump_version();
    const at::Tensor x = x_.unpack(), weight = weight_.unpack(), bias = bias_.unpack(), &dy = gradients[0];
    if (!dy.defined()) return variable_list(3);
    const bool need[] = {task_should_compute_output(0), task_should_compute_output(1),
                         task_should_compute_output(2)};
    torch::jit::Stack stack{dy, x, optional(weight)};
    if (at::GradMode::is_enabled()) {
      stack.insert(stack.end(), {optional(bias), record_, pooled_, eps_, need[0], need[1], need[2]});
      static const auto again = operator_named("mbnorm_cpu::backward_differentiably");
      again.callBoxed(stack);
      const c10::List<at::Tensor> wanted = stack[0].toTensorList();
      variable_list found(3);
      for (size_t i = 0, next = 0; i < 3; ++i)
        if (need[i]) found[i] = wanted[next++];
      return found;
    }
    stack.insert(stack.end(), {record_, pooled_, eps_, need[0]});
    static const auto backward = operator_named("mbnorm_cpu::backward_recorded");
    backward.callBoxed(stack);
    variable_list found(3);
    for (size_t i = 0; i < 3; ++i)
      if (need[i]) found[i] = std::move(stack[i]).toTensor();
    return found;
  }

 private:
  static c10::IValue optional(const at::Tensor& t) { return t.defined() ? c10::IValue(t) : c10::IValue(); }

  SavedVariable x_, weight_, bias_;
  at::Tensor record_;
  bool pooled_;
  double eps_;
};

// Raise the versions of what an operator (..., store, ...) is about to write, as torch's own operators do: graphs
// that hold it must not read what will be there then.
void raise_versions(const c10::FunctionSchema& schema, const c10::IValue* arguments) {
  if (!arguments[*schema.argumentIndexWithName("store")].toBool()) return;
  for (size_t i = 0; i < schema.arguments().size(); ++i) {
    const auto* alias = schema.arguments()[i].alias_info();
    if (!alias || !alias->isWrite() || arguments[i].isNone()) continue;
    const at::Tensor& written = arguments[i].toTensor();
    if (!written.is_inference()) written.unsafeGetTensorImpl()->bump_version();
  }
}

// Run an operator (x, weight, bias, pooled, eps, ...) -> (y, record) below autograd, and make y differentiable.
void differentiable(const c10::OperatorHandle& op, c10::DispatchKeySet keys, torch::jit::Stack* stack) {
  const size_t first = stack->size() - op.schema().arguments().size();
  const auto argument = [&](size_t i) {
    const c10::IValue& value = (*stack)[first + i];
    return value.isNone() ? at::Tensor() : value.toTensor();
  };
  const at::Tensor x = argument(0), weight = argument(1), bias = argument(2);
  const bool pooled = (*stack)[first + 3].toBool();
  const double eps = (*stack)[first + 4].toDouble();
  bool wanted = false;
  for (const at::Tensor& t : {x, weight, bias}) {
    if (!t.defined()) continue;
    wanted |= t.requires_grad();
    TORCH_CHECK_NOT_IMPLEMENTED(!t._fw_grad(0).defined(),
                                "the kernels of mbnorm have no forward-mode derivative: use backend=\"auto\"");
  }
  NodePointer node;
  Normalization* normalization = nullptr;
  if (wanted && at::GradMode::is_enabled()) {
    // first of all: what cannot be saved is refused before anything is written
    normalization = new Normalization(x, weight, bias, pooled, eps);
    node = owned<NodePointer>(static_cast<Node*>(normalization));
    node->set_next_edges(torch::autograd::collect_next_edges(x, weight, bias));
  }
  raise_versions(op.schema(), &(*stack)[first]);
  {
    const at::AutoDispatchBelowAutograd below;
    op.redispatchBoxed(keys & c10::after_autograd_keyset, stack);
  }
  if (!node) return;
  normalization->take(stack->back().toTensor());
  const at::Tensor& y = (*stack)[stack->size() - 2].toTensor();
  torch::autograd::impl::set_gradient_edge(y, {node, node->add_input_metadata(y)});
}

// Whether the backward pass that runs now comes through the node of a record; yes if that is gone.
bool awaits_backward(const at::Tensor& record) {
  Node* const node = const_cast<Node*>(nodes().find(record));
  if (!node) return true;
  const auto* reached = torch::autograd::get_current_graph_task_nodes_in_graph();
  if (!reached || !reached->count(node)) return false;
  const auto* plans = torch::autograd::get_current_graph_task_exec_info();
  if (plans->empty()) return true;
  const auto plan = plans->find(node);
  return plan != plans->end() && plan->second.should_execute();
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(mbnorm_cpu, m) {
  m.def("awaits_backward(Tensor record) -> bool", &awaits_backward);
  m.def(
      "backward_differentiably(Tensor dy, Tensor x, Tensor? weight, Tensor? bias, Tensor record, bool pooled, "
      "float eps, bool need_dx, bool need_dw, bool need_db) -> Tensor[]");
}

TORCH_LIBRARY_IMPL(mbnorm_cpu, AutogradCPU, m) {
  m.impl("forward_with_average", torch::CppFunction::makeFromBoxedFunction<&differentiable>());
  m.impl("forward_with_ring", torch::CppFunction::makeFromBoxedFunction<&differentiable>());
}
