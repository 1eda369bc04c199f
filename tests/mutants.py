"""Plants known faults in a copy of the code, one at a time, and runs the tests that must fail (make mutants).

Most are mistakes that other GRPO code has made. Each fault is a piece of text that occurs exactly once in its
file (change it here together with the code) and names its tests, every one of which must catch it. Prints a
line a fault; exits with status 1 where a test misses one, and 2 where the tests fail without any.
"""

import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TEST_FILES = ("tests/test_grpo.py", "tests/test_train.py", "tests/test_data.py", "tests/test_reward.py", *(
    f"tests/test_runtime_{name}.py"
    for name in ("adapters", "checkpoints", "files", "metrics", "ranks", "run_folder", "sharding",
                 "signals")))

# (file, text, text with the fault, what goes wrong, the tests that must fail)
MUTANTS = [
    # Advantages.
    ("grpo.py", "rewards_PG.std(1, keepdim=True)", "rewards_PG.std(1, keepdim=True, correction=0)",
     "the standard deviation is the biased one",
     ["test_advantages_of_a_worked_example",
      "test_the_standard_deviation_is_unbiased_and_1e_6_is_added_to_it"]),
    ("grpo.py", "keepdim=True) + 1e-6)", "keepdim=True) + 1e-8)",
     "another constant is added to the standard deviation",
     ["test_the_standard_deviation_is_unbiased_and_1e_6_is_added_to_it"]),
    ("grpo.py", "return torch.where(has_spread(rewards_PG)[:, None], adv_PG, 0.0)", "return adv_PG",
     "rounding of equal rewards becomes an advantage",
     ["test_equal_rewards_give_advantages_of_exactly_zero"]),
    ("grpo.py", " & rewards_PG.isfinite().all(1)", "",
     "a NaN reward becomes an advantage",
     ["test_a_reward_that_is_not_finite_silences_its_own_group_only"]),
    ("grpo.py", "rewards_PG.shape[1] < 2", "rewards_PG.shape[1] < 1",
     "a group of one is accepted",
     ["test_a_group_of_one_is_refused"]),
    ("grpo.py", "rewards_PG - rewards_PG.mean(1, keepdim=True)", "rewards_PG - rewards_PG[:, :1]",
     "the baseline depends on the order of the rollouts",
     ["test_permuting_rollouts_and_groups_permutes_advantages"]),
    ("grpo.py", "adv_N = adv_PG[trained_P].flatten()", "adv_N = adv_PG[trained_P].T.flatten()",
     "advantages are scrambled against rollouts",
     ["test_each_rollout_meets_its_own_advantage_and_sampled_log_probs",
      "test_the_update_is_the_gradient_of_a_loop_over_plain_sequences"]),
    # Packs.
    ("grpo.py", "[last_of_prompt, *range(len(tokens), len(tokens) + len(reply) - 1)]",
     "range(len(tokens) - 1, len(tokens) + len(reply) - 1)",
     "the reply before predicts the first token of a reply: a shift by one",
     ["test_pack_of_a_worked_example",
      "test_a_tree_equals_plain_sequences_in_loss_and_gradient",
      "test_changing_a_token_changes_only_its_own_log_prob_and_later_ones",
      "test_permuting_rollouts_with_their_rewards_changes_neither_loss_nor_gradient"]),
    ("grpo.py", "range(len(prompt), len(prompt) + len(reply))",
     "range(len(tokens) - len(reply), len(tokens))",
     "positions continue from the reply before",
     ["test_pack_of_a_worked_example",
      "test_loss_and_gradient_equal_a_loop_over_the_tokens_of_unpacked_sequences"]),
    ("grpo.py",
     "            targets += reply\n            reply_of += [first_reply] * len(reply)\n",
     "            predictor.pop()\n            targets += reply[:-1]\n"
     "            reply_of += [first_reply] * len(reply[:-1])\n",
     "the last token of a reply is masked, but the denominator counts it",
     ["test_log_probs_and_loss_live_on_the_same_tokens", "test_stop_token_receives_gradient"]),
    ("grpo.py", "                packs.append(pack(prompts, replies, first))\n",
     "                packs.append(pack(prompts, replies))\n",
     "replies are counted from 0 in each micro-batch and get the advantages of others",
     ["test_micro_batches_hold_every_reply_once_in_order_with_its_prompt",
      "test_each_rollout_meets_its_own_advantage_and_sampled_log_probs"]),
    ("grpo.py", "        starts_group = True\n",
     "        starts_group = not prompts or prompt != prompts[-1]\n",
     "groups are keyed by their prompt",
     ["test_groups_with_equal_prompts_stay_apart"]),
    ("model.py", "device=device).triu(prompt + 1)", "device=device).triu(prompt + reply)",
     "a token sees those that follow it in its reply",
     ["test_changing_a_token_changes_only_its_own_log_prob_and_later_ones",
      "test_a_tree_equals_plain_sequences_in_loss_and_gradient"]),
    # Token log-probs.
    ("grpo.py", "        return logp_CV.gather(1, targets_C[:, None])[:, 0], entropy_C\n",
     "        logp_C = logp_CV.gather(1, targets_C[:, None])[:, 0]\n"
     "        return logp_C.where(targets_C != targets_C.max(), logp_C.detach()), entropy_C\n",
     "the stop token, masked by its id, gets no gradient",
     ["test_stop_token_receives_gradient"]),
    ("grpo.py", "logits_CV if temperature == 1 else logits_CV / temperature", "logits_CV",
     "the temperature is forgotten",
     ["test_log_probs_and_entropy_equal_their_definitions",
      "test_loss_and_gradient_equal_a_loop_over_the_tokens_of_unpacked_sequences"]),
    ("grpo.py", "weight_VD = weight_VD[:vocab_size]", "weight_VD = weight_VD[:]",
     "rows without a token take part in the softmax",
     ["test_phantom_vocabulary_rows_change_nothing_and_get_no_gradient"]),
    ("grpo.py", "checkpoint(chunk_logprobs, hidden_CD, weight_VD, targets_C, use_reentrant=False)",
     "chunk_logprobs(hidden_CD, weight_VD, targets_C)",
     "the log-probs of all chunks wait for backward",
     ["test_what_one_chunk_keeps_for_backward_is_recomputed"]),
    ("grpo.py", "CHUNK_LOGITS // len(weight_VD)", "CHUNK_LOGITS // weight_VD.shape[1]",
     "a chunk is larger than it may be",
     ["test_the_logits_of_all_tokens_never_exist_at_once"]),
    ("grpo.py", "torch.cat(parts) for parts in zip(*chunks, strict=True)",
     "torch.cat(parts) for parts in zip(*chunks[::-1], strict=True)",
     "chunks come back in another order",
     ["test_chunks_of_tokens_change_neither_outputs_nor_gradients"]),
    ("grpo.py", "F.log_softmax(logits_CV, -1)", "logits_CV - logits_CV.exp().sum(-1, keepdim=True).log()",
     "the softmax overflows",
     ["test_log_probs_are_never_positive"]),
    # The loss.
    ("grpo.py", "log_ratio_L = logp_L - old_logp_L.detach()", "log_ratio_L = logp_L - logp_L.detach()",
     "the ratio is always 1 and never clips",
     ["test_after_an_update_the_ratio_moves_and_clips_on_both_sides",
      "test_the_second_mini_batch_moves_and_clips"]),
    ("grpo.py", "torch.minimum(plain_L, clipped_L)", "clipped_L",
     "the clip is no lower bound: accidents are not undone",
     ["test_the_clip_takes_the_lower_objective_and_stops_its_gradient"]),
    ("grpo.py", "ratio_L.clamp(1 - clip_low, 1 + clip_high)", "ratio_L.clamp(1 - clip_low, 1 + clip_low)",
     "the lower clip serves both sides",
     ["test_the_clip_takes_the_lower_objective_and_stops_its_gradient",
      "test_loss_and_gradient_equal_a_loop_over_the_tokens_of_unpacked_sequences"]),
    ("grpo.py", "log_ratio_L.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()", "log_ratio_L.exp()",
     "the ratio overflows",
     ["test_the_log_ratio_is_clamped_at_20_and_its_largest_size_logged"]),
    ("grpo.py", "(ref_logp_L.detach() - logp_L).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)",
     "ref_logp_L.detach() - logp_L",
     "the KL overflows",
     ["test_the_log_ratio_is_clamped_at_20_and_its_largest_size_logged"]),
    ("grpo.py", "torch.expm1(d_L) - d_L", "d_L.exp() - 1 - d_L",
     "k3 loses its digits near zero",
     ["test_k3_keeps_its_digits_near_zero", "test_k3_is_never_negative"]),
    ("grpo.py", "kl_L = torch.expm1(d_L) - d_L", "kl_L = torch.exp(d_L) - d_L",
     "the KL of equal models is not zero",
     ["test_kl_is_exactly_zero_where_the_reference_is_the_policy",
      "test_on_policy_ratio_is_exactly_1_and_kl_0_at_temperature_0_7"]),
    ("grpo.py", "(ref_logp_L.detach() - logp_L)", "(logp_L - ref_logp_L.detach())",
     "the KL is that of the reference from the policy",
     ["test_statistics_of_a_worked_example",
      "test_loss_and_gradient_equal_a_loop_over_the_tokens_of_unpacked_sequences"]),
    ("grpo.py", "(ref_logp_L.detach() - logp_L)", "(ref_logp_L - logp_L)",
     "the reference is trained",
     ["test_old_and_reference_log_probs_receive_no_gradient"]),
    ("grpo.py", "loss = loss_L.sum() / denominator", "loss = loss_L.mean()",
     "the mean of each micro-batch: the loss depends on the split, and is NaN without tokens",
     ["test_loss_and_gradient_do_not_depend_on_the_split_into_micro_batches",
      "test_the_denominator_is_the_given_one_whatever_the_part_holds",
      "test_a_part_without_tokens_is_a_finite_zero_with_a_graph",
      "test_micro_batches_change_neither_weights_nor_metrics"]),
    ("runtime/metrics.py", "torch.stack([part[name] for part in parts])", "parts[-1][name]",
     "the logged loss and statistics are the last micro-batch's",
     ["test_the_logged_loss_is_the_sum_that_was_differentiated",
      "test_merged_statistics_are_sums_and_extremes_and_keep_a_nan",
      "test_the_logged_loss_is_that_of_the_whole_batch"]),
    ("grpo.py", "return -logp_L.sum() / denominator", "return -logp_L.mean()",
     "the supervised loss depends on the split",
     ["test_sft_loss_equals_cross_entropy_of_the_reply_tokens",
      "test_micro_batches_do_not_change_a_supervised_update"]),
    # The updates of a step.
    ("train.py", "for i in range(prompts.start * G, prompts.stop * G)",
     "for p in trained_P for i in range(p * G, p * G + G)",
     "groups without spread leave the denominator",
     ["test_groups_without_spread_are_left_out_but_stay_in_the_denominator"]),
    ("train.py", "batch.old_logp_L, _ = logprobs(policy, batch.pack)",
     "batch.old_logp_L, _ = logprobs(policy, batch.pack, temperature=1.0)",
     "the old log-probs lack the temperature",
     ["test_on_policy_ratio_is_exactly_1_and_kl_0_at_temperature_0_7"]),
    ("train.py", "batch.ref_logp_L, _ = logprobs(reference, batch.pack)",
     "batch.ref_logp_L, _ = logprobs(reference, batch.pack, temperature=1.0)",
     "the reference's log-probs lack the temperature",
     ["test_on_policy_ratio_is_exactly_1_and_kl_0_at_temperature_0_7"]),
    ("train.py", "logprobs_of_pack, temperature=temperature,", "logprobs_of_pack, temperature=1.0,",
     "the trainer scores another distribution than the one sampled from",
     ["test_sampled_log_probs_equal_those_of_the_trainer"]),
    ("train.py", "old_logp_L = logp_L.detach() if", "old_logp_L = batch.sampled_logp_L if",
     "the old log-probs of the first mini-batch are the sampler's",
     ["test_the_first_mini_batch_is_on_policy"]),
    ("train.py", "    if not skipped:\n        optimizer.step()\n", "    optimizer.step()\n",
     "a gradient that is not finite is applied",
     ["test_a_gradient_that_is_not_finite_is_skipped_and_counted",
      "test_only_the_update_whose_gradient_is_not_finite_is_skipped"]),
    # Several ranks.
    ("runtime/sharding.py",
     "            module.set_force_sum_reduction_for_comms(True)\n"
     "            module.set_gradient_divide_factor(1.0)\n",
     "            pass\n",
     "gradients are averaged over ranks, though each loss is divided by the tokens of all",
     ["test_the_gradient_is_the_sum_over_ranks_and_not_the_mean"]),
    ("runtime/ranks.py", "items[len(items) * rank // ranks:len(items) * (rank + 1) // ranks]",
     "items[len(items) // ranks * rank:len(items) // ranks * (rank + 1)]",
     "what does not divide evenly over the ranks is dropped",
     ["test_three_ranks_exchange_values_share_work_and_raise_what_the_first_one_raised"]),
    ("runtime/ranks.py", "sorted(itertools.chain(*all_gather(parts)), key=lambda part: part[0])",
     "itertools.chain(*all_gather(parts))",
     "gathered rollouts are in the order of the ranks, not of the prompts",
     ["test_without_other_ranks_each_function_is_the_plain_one",
      "test_three_ranks_exchange_values_share_work_and_raise_what_the_first_one_raised"]),
    # Checkpoints and resume.
    ("train.py", "batches.cursor = run.cursor or run.step * c.train.prompts_per_step", "batches.cursor = 0",
     "a resumed run begins the data again",
     ["test_a_resumed_run_has_the_bytes_of_an_undisturbed_one_though_a_torn_checkpoint_is_newer"]),
    ("train.py", "        read_moments(checkpoint, policy, optimizer)\n", "        pass\n",
     "a resumed run begins with empty moments",
     ["test_a_resumed_run_has_the_bytes_of_an_undisturbed_one_though_a_torn_checkpoint_is_newer"]),
    ("runtime/checkpoints.py", "values.copy_(slices[f\"{name}.{key}\"][rows])",
     "values.copy_(slices[f\"{name}.{key}\"][:len(values)])",
     "every rank reads the moments of rank 0",
     ["test_two_ranks_read_their_rows_of_the_moments_that_one_process_wrote"]),
    ("runtime/checkpoints.py", "    seal(temporary)\n", "    write_json(temporary / \"manifest.json\", {})\n",
     "a checkpoint gets its name before it is sealed",
     ["test_all_of_a_checkpoint_is_on_the_disk_before_its_manifest_and_its_name"]),
    ("runtime/files.py", "        if digest(file) != hexadecimal:\n", "        if False:\n",
     "a checkpoint is used without a check of its hashes",
     ["test_one_flipped_bit_anywhere_in_a_checkpoint_is_seen",
      "test_a_seal_finds_every_damage_and_says_which"]),
    ("runtime/checkpoints.py", "set(final.parent.glob(\"step_??????\")) - skipped",
     "set(final.parent.glob(\"step_??????\"))",
     "checkpoint.keep counts and deletes what a resume has skipped",
     ["test_only_so_many_checkpoints_are_kept_and_spoiled_ones_neither_count_nor_are_deleted"]),
    ("runtime/run_folder.py", "self.trained_s += metrics[\"time/step_s\"]",
     "self.trained_s = metrics[\"time/step_s\"]",
     "train.max_minutes limits one step, not the run",
     ["test_minutes_of_steps_are_summed_over_a_restart"]),
    ("runtime/signals.py", "time.monotonic() > self.received_s + 1", "time.monotonic() > self.received_s",
     "the launcher's echo of a signal kills the run before it has saved",
     ["test_a_second_signal_kills_the_process_but_an_echo_of_the_first_does_not"]),
    # Dynamic sampling.
    ("grpo.py", "    if sum(spread_P) < wanted and", "    if not any(spread_P) and",
     "one group with spread is enough: no further batch is drawn",
     ["test_a_step_takes_the_first_groups_with_spread_in_the_order_drawn"]),
    ("grpo.py", "key=lambda p: not spread_P[p]", "key=lambda p: spread_P[p]",
     "groups without spread take the places of those with it",
     ["test_a_step_takes_the_first_groups_with_spread_in_the_order_drawn"]),
    ("grpo.py", "sorted(sorted(range(len(spread_P)), key=lambda p: not spread_P[p])[:wanted])",
     "sorted(range(len(spread_P)), key=lambda p: not spread_P[p])[:wanted]",
     "groups leave the order of the data",
     ["test_a_step_takes_the_first_groups_with_spread_in_the_order_drawn"]),
    # Other losses.
    ("grpo.py", "index_add(0, reply_L, x_L) / lengths_N", "index_add(0, reply_L, x_L)",
     "the sequence ratio is the product over the tokens, not their geometric mean",
     ["test_each_loss_and_its_gradient_equal_a_loop_written_from_its_paper",
      "test_the_gradient_of_the_sequence_ratio_is_that_of_the_paper"]),
    ("grpo.py", "mean_N.index_select(0, reply_L)", "x_L.mean().expand_as(x_L)",
     "the sequence ratio is that of the micro-batch",
     ["test_each_loss_and_its_gradient_equal_a_loop_written_from_its_paper",
      "test_no_loss_depends_on_the_split_into_micro_batches",
      "test_for_replies_of_one_token_the_sequence_ratio_is_the_ratio_of_the_token"]),
    ("grpo.py", "mean_over_reply(log_ratio_L, reply_L)", "mean_over_reply(log_ratio_L.detach(), reply_L)",
     "the sequence ratio has no gradient",
     ["test_each_loss_and_its_gradient_equal_a_loop_written_from_its_paper",
      "test_on_policy_all_ratios_and_clips_have_the_gradient_of_reinforce"]),
    ("grpo.py", "-clipped_L.detach() * logp_L", "-clipped_L * logp_L",
     "the weight of CISPO is differentiated",
     ["test_each_loss_and_its_gradient_equal_a_loop_written_from_its_paper",
      "test_on_policy_all_ratios_and_clips_have_the_gradient_of_reinforce"]),
    ("grpo.py", "-clipped_L.detach() * logp_L", "-torch.minimum(plain_L, clipped_L).detach() * logp_L",
     "the weight of CISPO is clipped by PPO's rule, on one side only",
     ["test_each_loss_and_its_gradient_equal_a_loop_written_from_its_paper",
      "test_cispo_counts_the_tokens_whose_weight_is_clipped_whatever_their_advantage"]),
    ("grpo.py", "clipped_L != plain_L", "clipped_L < plain_L",
     "only some of the clipped weights of CISPO are counted",
     ["test_cispo_counts_the_tokens_whose_weight_is_clipped_whatever_their_advantage"]),
    ("grpo.py", "(\"sequence\", \"ppo\"), (\"token\", \"cispo\"))",
     "(\"sequence\", \"ppo\"), (\"token\", \"cispo\"), (\"sequence\", \"cispo\"))",
     "CISPO takes the ratio of a sequence, a loss that no paper has",
     ["test_losses_that_no_paper_has_are_refused"]),
    ("grpo.py", "        loss_L = loss_L * weight_L.to(loss_L.dtype)\n", "        pass\n",
     "weights of tokens are forgotten: long replies count more in a mean over replies",
     ["test_each_loss_and_its_gradient_equal_a_loop_written_from_its_paper",
      "test_for_replies_of_one_length_the_averages_differ_by_length_over_limit"]),
    ("grpo.py", "        loss_L = loss_L * weight_L.to(loss_L.dtype)\n",
     "        loss_L = kl_coef * kl_L + (loss_L - kl_coef * kl_L) * weight_L.to(loss_L.dtype)\n",
     "the KL penalty is left out of the mean over a reply",
     ["test_each_loss_and_its_gradient_equal_a_loop_written_from_its_paper"]),
    ("grpo.py", "\"reply\": len(lengths), \"constant\"", "\"reply\": sum(lengths), \"constant\"",
     "a mean over replies is divided by the tokens",
     ["test_token_weights_of_a_worked_example",
      "test_for_replies_of_one_length_the_averages_differ_by_length_over_limit"]),
    ("grpo.py", "limit and len(lengths) * limit", "limit and sum(lengths)",
     "the constant of Dr. GRPO is the length of the replies",
     ["test_token_weights_of_a_worked_example",
      "test_each_loss_and_its_gradient_equal_a_loop_written_from_its_paper"]),
    ("grpo.py", "token_weights([rollout.ids for group in groups_P for rollout in group], average)",
     "token_weights([rollout.ids for rollout in rollouts_N], average)",
     "weights are those of other replies where a group was left out",
     ["test_no_loss_depends_on_the_ranks_and_groups_without_spread_count_in_the_denominator"]),
    ("grpo.py", "            replies[-1].append(reply)\n            size += len(reply)\n",
     "            if len(reply) > 3 and size + len(reply) == max_tokens:\n"
     "                packs.append(pack(prompts, [*replies[:-1], [*replies[-1], reply[:1]]], first))\n"
     "                prompts, replies, size, first = [prompt], [[]], len(prompt), index\n"
     "                reply = reply[1:]\n"
     "            replies[-1].append(reply)\n            size += len(reply)\n",
     "a reply is split between micro-batches",
     ["test_no_reply_is_split_between_micro_batches"]),
    # Chat formats.
    ("data.py", 'message["content"].strip()) for message', 'message["content"]) for message',
     "Llama-3's content is not trimmed",
     ["test_chats_are_rendered_as_each_family_publishes_them"]),
    ("data.py", 'return f"{begin}{text}"', "return text",
     "a prompt of Llama-3 lacks its first token",
     ["test_chats_are_rendered_as_each_family_publishes_them"]),
    ("data.py", "return self.decode(ids[:-1] if ids and ids[-1] in self.stop_ids else ids)",
     "return self.decode(ids)",
     "the stop token that ended a rollout is judged with its text",
     ["test_the_judged_text_has_no_stop_token_whichever_ended_the_reply",
      "test_replies_of_each_family_end_with_its_token_and_are_judged_without_it"]),
    ("reward.py", 'headers = (f"{IM_START}assistant", f"{HEADER}assistant{END_HEADER}")',
     'headers = (f"{IM_START}assistant",)',
     "official reads a reply of Llama-3 from its start",
     ["test_the_strict_and_the_released_verdict"]),
    # Adapters.
    ("runtime/adapters.py", "return (W + change).to(self.dtype)", "return W.to(self.dtype)",
     "rollouts and exports lack the adapters",
     ["test_a_merged_model_equals_the_adapted_one_and_a_plain_one_the_base"]),
    ("runtime/adapters.py", "layer.weight, layer.bias, alpha / rank", "layer.weight, layer.bias, alpha",
     "the adapters' product is not divided by the rank",
     ["test_gradients_of_the_adapters_equal_autograd_through_the_merged_weight"]),
    ("train.py", "sharding.unsharded(reference, merged=False)", "sharding.unsharded(reference)",
     "the KL reference follows the adapters",
     ["test_a_run_with_adapters_learns_and_keeps_its_base"]),
]


def homes_of_tests():
    """{name of a test: its file}"""
    texts = {file: (ROOT / file).read_text(encoding="utf-8") for file in TEST_FILES}
    return {name: file for file in TEST_FILES for name in re.findall(r"(?m)^def (test_\w+)", texts[file])}


def run_tests(tests, file=None, old=None, new=None):
    """(status of pytest, names of the tests that failed, its output) on a copy of the code, with a fault
    where one is given."""
    with tempfile.TemporaryDirectory(prefix="mutant_") as folder:
        copy = Path(folder)
        for path in [*ROOT.glob("*.py"), ROOT / "pyproject.toml"]:
            shutil.copy(path, copy)
        for name in ("benchmarks", "configs", "converters", "fast", "runtime", "tests", "tools"):
            shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
        (copy / "assets").symlink_to(ROOT / "assets")
        if file:
            text = (copy / file).read_text(encoding="utf-8")
            if text.count(old) != 1:
                print(f"error: {file} holds {old!r} {text.count(old)} times, not once: correct MUTANTS")
                sys.exit(2)
            (copy / file).write_text(text.replace(old, new), encoding="utf-8")
        homes = homes_of_tests()
        done = subprocess.run(
            [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--tb=no",
             *(f"{homes[test]}::{test}" for test in tests)],
            cwd=copy, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
        failed = set(re.findall(r"(?m)^FAILED [^:\s]+::(test_\w+)", done.stdout))
        return done.returncode, failed, done.stdout + done.stderr


def main():
    began = time.perf_counter()
    status, failed, output = run_tests(sorted({test for mutant in MUTANTS for test in mutant[4]}))
    if status:
        print(f"{output}\nerror: tests fail without a planted fault; make them pass first")
        sys.exit(2)
    survived = 0
    for file, old, new, what, tests in MUTANTS:
        status, failed, output = run_tests(tests, file, old, new)
        missed = [test for test in tests if test not in failed]
        survived += bool(missed)
        print(f"{'SURVIVED' if missed else 'caught':8}  {file:22}  {what}", flush=True)
        for test in missed:
            print(f"          did not fail: {test}")
        # 1 is pytest's "some tests failed"; above it the fault broke more than a test can show.
        if status > 1:
            print(output)
    print(f"{len(MUTANTS) - survived} of {len(MUTANTS)} planted faults caught "
          f"in {time.perf_counter() - began:.0f} s")
    sys.exit(1 if survived else 0)


if __name__ == "__main__":
    main()
