// Every op of moe_ext, by family, forward first. Nothing else lives here.
//
// Shapes: T = num_tokens, K = topk, E = num_experts, H = hidden_size, I = intermediate_size,
// M = rows of the permuted buffer (a static bound, see routing_plan), S = rows sent to other ranks.
// No argument has a default: the Python wrappers in moe_ext/ops own the defaults.
#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY(moe_ext, m) {
  // ---- gating: logits [T, E] -> who goes where, and with which weight
  m.def(
      "topk_gating(Tensor logits, int topk, str score_function, str score_order, Tensor? selection_bias, "
      "Tensor? expert_mask, int num_groups, int topk_groups, bool renormalize, float renormalize_eps, float scale) "
      "-> (Tensor topk_weights, Tensor topk_ids)");
  m.def(
      "topk_gating_backward(Tensor grad_topk_weights, Tensor logits, Tensor topk_ids, str score_function, "
      "str score_order, Tensor? expert_mask, bool renormalize, float renormalize_eps, float scale) -> Tensor");
  m.def(
      "topk_gating_general(Tensor logits, int topk, str score_function, str score_order, Tensor? selection_bias, "
      "Tensor? expert_mask, int num_groups, int topk_groups, bool renormalize, float renormalize_eps, float scale, "
      "int first_rank, Tensor? forced_ids, float? top_p, float? min_ratio, Tensor? keep_tokens, str weight_source, "
      "Tensor? external_weights, Tensor? zero_weight_experts, Tensor? expert_gain, bool return_next_logit) "
      "-> (Tensor topk_weights, Tensor topk_ids, Tensor next_logit, Tensor next_id)");
  m.def(
      "topk_gating_general_backward(Tensor grad_topk_weights, Tensor logits, Tensor topk_ids, str score_function, "
      "str score_order, Tensor? expert_mask, bool renormalize, float renormalize_eps, float scale, "
      "Tensor? grad_next_logit, Tensor? next_id, str weight_source, Tensor? external_weights, "
      "Tensor? zero_weight_experts, Tensor? expert_gain) -> (Tensor grad_logits, Tensor grad_external_weights)");
  m.def(
      "router_losses(Tensor logits, Tensor topk_ids, str score_function, Tensor? token_mask, Tensor? expert_weights, "
      "str load, int num_sequences) "
      "-> (Tensor balance_loss, Tensor z_loss, Tensor tokens_per_expert, Tensor num_counted)");
  m.def(
      "router_losses_backward(Tensor grad_balance_loss, Tensor grad_z_loss, Tensor logits, Tensor tokens_per_expert, "
      "Tensor num_counted, str score_function, Tensor? token_mask, Tensor? expert_weights, str load, int topk) "
      "-> Tensor");
  m.def(
      "expert_choice_gating(Tensor logits, SymInt capacity, str score_function) "
      "-> (Tensor topk_weights, Tensor topk_ids)");
  m.def(
      "expert_choice_gating_backward(Tensor grad_topk_weights, Tensor logits, Tensor topk_ids, str score_function) "
      "-> Tensor");

  // ---- plan: topk_ids [T, K] -> rows sorted by expert
  m.def(
      "routing_plan(Tensor topk_ids, int num_experts, SymInt? capacity, Tensor? drop_scores, int row_alignment) "
      "-> (Tensor expert_offsets, Tensor tokens_per_expert, Tensor permuted_to_slot, Tensor slot_to_permuted)");

  // ---- permutation: [T, H] <-> [M, H]
  m.def("permute(Tensor input, Tensor permuted_to_slot, Tensor slot_to_permuted, int topk) -> Tensor");
  m.def(
      "unpermute(Tensor input, Tensor permuted_to_slot, Tensor slot_to_permuted, Tensor? topk_weights, int topk) "
      "-> Tensor");
  m.def(
      "unpermute_backward(Tensor grad_output, Tensor input, Tensor permuted_to_slot, Tensor slot_to_permuted, "
      "Tensor topk_weights) -> (Tensor grad_input, Tensor grad_topk_weights)");

  // ---- grouped_gemm: one matrix product per expert over contiguous rows
  m.def(
      "grouped_gemm(Tensor input, Tensor weight, Tensor expert_offsets, str weight_layout, Tensor? bias, "
      "Tensor? permuted_to_slot, Tensor? slot_to_permuted, int topk, str activation, str gate_up_layout, "
      "float activation_alpha, float activation_limit, bool save_pre_activation) "
      "-> (Tensor output, Tensor pre_activation)");
  m.def(
      "grouped_gemm_wgrad(Tensor input, Tensor grad_output, Tensor expert_offsets, str weight_layout, "
      "Tensor? permuted_to_slot, Tensor? slot_to_permuted, int topk, ScalarType? out_dtype, "
      "Tensor? trainable_experts) -> Tensor");
  m.def("grouped_bias_grad(Tensor grad_output, Tensor expert_offsets, ScalarType? out_dtype) -> Tensor");

  // ---- experts: activations, and the whole expert MLP as one op
  m.def(
      "expert_activation(Tensor pre_activation, str activation, str gate_up_layout, float activation_alpha, "
      "float activation_limit) -> Tensor");
  m.def(
      "expert_activation_backward(Tensor grad_output, Tensor pre_activation, str activation, str gate_up_layout, "
      "float activation_alpha, float activation_limit) -> Tensor");
  m.def(
      "moe_mlp(Tensor input, Tensor gate_up_weight, Tensor down_weight, Tensor expert_offsets, "
      "Tensor permuted_to_slot, Tensor slot_to_permuted, Tensor? topk_weights, Tensor? gate_up_bias, "
      "Tensor? down_bias, int topk, str weight_layout, str activation, str gate_up_layout, float activation_alpha, "
      "float activation_limit, bool save_pre_activation, Tensor? trainable_experts) "
      "-> (Tensor output, Tensor pre_activation)");
  m.def(
      "moe_mlp_backward(Tensor grad_output, Tensor input, Tensor gate_up_weight, Tensor down_weight, "
      "Tensor expert_offsets, Tensor permuted_to_slot, Tensor slot_to_permuted, Tensor? topk_weights, "
      "Tensor? gate_up_bias, Tensor? down_bias, Tensor pre_activation, int topk, str weight_layout, str activation, "
      "str gate_up_layout, float activation_alpha, float activation_limit, bool[] output_mask, Tensor? "
      "trainable_experts) "
      "-> (Tensor grad_input, Tensor grad_gate_up_weight, Tensor grad_down_weight, Tensor grad_topk_weights, "
      "Tensor grad_gate_up_bias, Tensor grad_down_bias)");

  // ---- lora: low-rank adapters as experts; r = rank
  m.def(
      "low_rank_experts(Tensor input, Tensor lora_a, Tensor lora_b, Tensor topk_ids, Tensor topk_weights) "
      "-> (Tensor output, Tensor projection)");
  m.def(
      "low_rank_experts_backward(Tensor grad_output, Tensor input, Tensor lora_a, Tensor lora_b, "
      "Tensor topk_ids, Tensor topk_weights, Tensor projection, Tensor expert_offsets, Tensor permuted_to_slot, "
      "bool[] output_mask) "
      "-> (Tensor grad_input, Tensor grad_lora_a, Tensor grad_lora_b, Tensor grad_topk_weights)");

  // ---- all_to_all: what stands around torch.distributed.all_to_all_single; R ranks, L = min(K, R)
  m.def(
      "a2a_plan(Tensor topk_ids, Tensor rank_expert_offsets) "
      "-> (Tensor send_counts, Tensor send_offsets, Tensor send_to_slot, Tensor slot_to_send)");
  m.def(
      "a2a_pack(Tensor hidden, Tensor topk_ids, Tensor topk_weights, Tensor rank_expert_offsets, Tensor send_offsets, "
      "Tensor send_to_slot, Tensor slot_to_send) -> (Tensor send_hidden, Tensor send_ids, Tensor send_weights)");
  m.def(
      "a2a_pack_backward(Tensor grad_send_hidden, Tensor grad_send_weights, Tensor topk_ids, "
      "Tensor rank_expert_offsets, Tensor send_offsets, Tensor send_to_slot, Tensor slot_to_send) "
      "-> (Tensor grad_hidden, Tensor grad_topk_weights)");
  m.def(
      "a2a_unpack(Tensor recv_hidden, Tensor recv_ids, int num_local_experts, int row_alignment) "
      "-> (Tensor permuted, Tensor expert_offsets, Tensor tokens_per_expert, Tensor permuted_to_slot, "
      "Tensor slot_to_permuted)");
  m.def("a2a_combine(Tensor recv_rows, Tensor send_to_slot, Tensor slot_to_send, int slots_per_token) -> Tensor");
  m.def(
      "a2a_pack_rows(Tensor hidden, Tensor topk_ids, Tensor? topk_weights, Tensor rank_expert_offsets, "
      "Tensor send_offsets, Tensor send_to_slot, Tensor slot_to_send, str payload, int copies) -> Tensor");
  m.def(
      "a2a_unpack_rows(Tensor rows, int hidden_size, int topk, ScalarType dtype, str payload, bool weighted) "
      "-> (Tensor hidden, Tensor topk_ids, Tensor topk_weights)");
}
