"""Plant one mistake at a time in a copy of the working tree and report those that no test notices.

    uv run python tests/mutants.py                  # all of them, one after another: a quarter hour
    uv run python tests/mutants.py doremi moments   # those whose file or text holds a word

Not collected by pytest and not run by CI. A mutant names the one place in a file that it changes;
where that text is no longer there exactly once, the mutant is out of date, which is an error. Exit
code: 0 all noticed, 1 survivors, 2 mutants or tests that are out of date.
"""

from __future__ import annotations

import importlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parents[1]

#: Libraries imported once.
HEAVY = ("datasets", "faiss", "hypothesis", "numba", "peft", "pyarrow", "scipy.stats", "torch",
         "transformers", "transformers.trainer", "typer.testing", "zarr")  # fmt: skip
#: The last: of plugins among those libraries.
OPTIONS = ("-n", "0", "-x", "-q", "-m", "not gpu", "-p", "no:cacheprovider",
           "-W", "ignore::pytest.PytestAssertRewriteWarning")  # fmt: skip
#: Seconds that the tests of one mistake may take.
LONGEST = 600


class Mutant(NamedTuple):
    """One mistake: in `file`, `text` becomes `instead`, and one of `tests` must fail."""

    file: str
    text: str
    instead: str
    tests: str


STORE, FORMAT = "tests/gradstore_/store", "tests/gradstore_/format"
DAMAGE, RUNS = f"{STORE}/test_damage.py", f"{STORE}/test_runs.py"
PLANS = f"{FORMAT}/test_plans.py"
SEALS = f"{DAMAGE}::test_another_plan_or_provenance_is_reported_even_with_a_new_seal"
FEATURES, MOMENTS = (
    "tests/gradstore_/export/test_features.py",
    "tests/gradstore_/export/test_moments.py",
)
INFLUENCE = "tests/gradstore_/scoring/test_influence.py"
SELECTION = "tests/gradstore_/scoring/test_selection.py"
INDEX = "tests/gradstore_/similarity/test_index.py"
JOINED = "tests/gradstore_/export/test_joined.py"
CAPTURE = "tests/gradstore_/capture/test_per_sample.py"
DENSE = "tests/gradstore_/capture/test_dense.py"
ROWS = "tests/gradstore_/capture/test_rows.py"
SCALING = "tests/gradstore_/capture/test_scaling.py"
ONE_OPERATION = "tests/gradstore_/capture/test_lora.py"
WHOLE = "tests/gradstore_/export/test_whole_weights.py"
LOCK = "tests/gradstore_/storage/test_lock.py"
OBJECTS = "tests/gradstore_/storage/test_object_faults.py"
SERVICE, WRITING = (
    "tests/gradstore_/storage/test_service.py",
    "tests/gradstore_/serve/test_writing.py",
)
OBJECT_LOCK = "tests/gradstore_/storage/test_object_lock.py"
LATE = "tests/gradstore_/storage/test_late_writes.py"
PROBES = "tests/gradstore_/storage/test_object_probes.py"
POWER = "tests/gradstore_/storage/test_power_loss.py"
ACTORS, SCANS = (
    "tests/dataflex_/features/test_engines.py",
    "tests/gradstore_/scoring/test_engines.py",
)
LEASES, WORKERS = "tests/gradstore_/storage/test_leases.py", f"{STORE}/test_workers.py"
BEHIND, FILLING = f"{STORE}/test_writing_behind.py", "gradstore/store/filling.py"
UNITS = "tests/gradstore_/export/test_units.py"
SMALLER = "tests/gradstore_/export/test_smaller.py"
REPAIR, FORGETTING = f"{STORE}/test_repair.py", f"{STORE}/test_forgetting.py"
CHUNKS, PACKED = f"{STORE}/test_chunks.py", "tests/gradstore_/scoring/test_dtypes.py"
SIGNS = "tests/gradkernels_/test_sign_products.py"
BYTES = "tests/gradkernels_/test_projection_int8.py"
PROJECTION = "tests/gradkernels_/test_projection_paths.py"
MIXTURE, ORDER = "tests/dataflex_/data/test_mixture.py", "tests/dataflex_/data/test_order.py"
MIXERS, DOREMI = "tests/dataflex_/mixers/test_mixers.py", "tests/dataflex_/mixers/test_doremi.py"
WEIGHTERS, WEIGHTS = "tests/dataflex_/weighters", "tests/dataflex_/trainers/test_weights.py"
SEAM = "tests/dataflex_/trainers/test_loss_seam.py"
CHECKPOINTS = "tests/dataflex_/checkpoints"
SCHEDULE, RANKS = "tests/dataflex_/run/test_schedule.py", "tests/dataflex_/run/test_ranks.py"
SELECTORS = "tests/dataflex_/selectors"

MUTANTS = [
    # -- what is on disk: checksums, commits, plans, locks --
    Mutant("gradstore/store/unit_files.py", "if found != expected.sha256:", "if False:",
           f"{DAMAGE}::test_a_chunk_made_to_fit_its_crc32c_is_told_by_its_sha256"),
    Mutant("gradstore/store/unit_files.py", '("plan", plan_sha256, record.plan_sha256),', "",
           f"{DAMAGE}::test_a_unit_of_another_plan_is_done_again_however_well_it_is_sealed"),
    Mutant("gradstore/store/unit_files.py", "found != expected or", "False or", DAMAGE),
    Mutant("gradstore/store/documents.py", '("store", store_uuid, commit.store_uuid),', "",
           f"{DAMAGE}::test_commits_of_another_store_are_no_commits_of_this_one"),
    Mutant("gradstore/store/documents.py", '("parent", parent, commit.parent),', "",
           f"{DAMAGE}::test_fault_22_an_edited_commit_breaks_the_chain_even_with_a_new_seal"),
    Mutant("gradstore/store/documents.py", '("sha256", commit.plan_sha256, found),', "", SEALS),
    Mutant("gradstore/store/documents.py", "if found != plan.provenance_sha256:", "if False:",
           SEALS),
    Mutant("gradstore/format/plans.py", "if unit != _spelled(start, stop, hashes, sources):",
           "if False:", PLANS),
    Mutant("gradstore/format/plans.py", "if not after.startswith(", "if False and (", PLANS),
    Mutant("gradstore/format/canonical.py", "if lead + given + after != data[:cut]:", "if False:",
           PLANS),
    Mutant("gradstore/format/canonical.py", "if document[SEAL] != digest.hexdigest():", "if False:",
           PLANS),
    Mutant("gradstore/store/generation_writer.py", "    check_committed_plan(files, draft)\n",
           "    pass\n", DAMAGE),
    Mutant("gradstore/store/generation_writer.py", "    check_beside_plan(files, plan)\n",
           "    pass\n", DAMAGE),
    Mutant("gradstore/format/unit_records.py", "if expected != data:", "if False:", PLANS),
    Mutant("gradstore/store/attempts.py", "    _check_rows(store, planned, wanted)\n", "", RUNS),
    Mutant("gradstore/store/repair.py", "    if others:\n", "    if False:\n", REPAIR),
    Mutant("gradstore/store/unit_files.py", "if sha == commit.units[unit.index]:", "if True:",
           REPAIR),
    Mutant("gradstore/store/cleaning.py", 'dict.fromkeys(_dead_staging(files), "staging")', "{}",
           "tests/gradstore_/cli/test_care.py"),
    Mutant("gradstore/store/forgetting.py", "    files.remove_tree(INDEX)\n", "", FORGETTING),
    Mutant("gradstore/store/forgetting.py", "    files.remove_tree(QUARANTINE)\n", "", FORGETTING),
    Mutant("gradstore/store/space_writer.py",
           "        rows = self._view().without_forgotten(rows, of=record.set)\n", "",
           FORGETTING),
    Mutant("gradstore/store/text_writer.py", "    rows = view().without_forgotten(rows)\n", "",
           FORGETTING),
    Mutant("gradstore/store/writer.py", "        finish_removals(files, lambda: self.store)\n", "",
           FORGETTING),
    Mutant("gradstore/format/records.py", "if key not in _NOT_IDENTITY}", 'if key == "name"}',
           RUNS),
    Mutant("gradstore/format/records.py", "for values in (input_ids, labels):",
           "for values in (input_ids, input_ids):", FORMAT),
    Mutant("gradstore/format/provenance.py", "if largest <= CANARY_TOLERANCE * size:", "if True:",
           f"{FORMAT}/test_provenance.py"),
    Mutant("gradstore/export/gradient_space.py", '"canary": canary(projection).tolist()',
           '"canary": []', "tests/dataflex_/features/test_fields.py"),
    Mutant("gradstore/storage/lock.py", "fcntl.LOCK_EX):\n                raise",
           "fcntl.LOCK_SH):\n                raise", LOCK),
    Mutant("gradstore/storage/lock.py", "if is_set_up():", "if True:", LOCK),
    Mutant("gradstore/storage/objects.py", "                return found.data == data",
           "                return False", OBJECTS),
    Mutant("gradstore/storage/object_probes.py", "if second or found is None or", "if False and",
           OBJECTS),
    Mutant("gradstore/storage/object_probes.py", "            if not left:\n",
           "            if True:\n", PROBES),
    Mutant("gradstore/storage/object_lock.py", "if sign.content != content:", "if not content:",
           OBJECT_LOCK),
    Mutant("gradstore/storage/object_lock.py", "if not any(each.token == self._files.own",
           "if False and any(each.token == self._files.own",
           f"{OBJECT_LOCK}::test_a_holder_that_slept_changes_nothing_once_it_wakes"),
    Mutant("gradstore/storage/object_lock.py", "if self._write(record, record.holders,",
           "if True or self._write(record, record.holders,",
           f"{OBJECT_LOCK}::test_of_a_holder_that_wakes_and_one_that_takes_over_one_has_the_lock"),
    Mutant("gradstore/storage/object_lock.py", "asked - sign.since", "now - sign.since",
           f"{OBJECT_LOCK}::test_a_sign_of_life_that_comes_while_an_answer_is_on_its_way_is_not"
           "_missed"),
    Mutant("gradstore/storage/object_lock.py", "if _now() - before < SILENT_SECONDS:", "if True:",
           f"{OBJECT_LOCK}::test_a_sign_of_life_that_may_have_come_too_late_says_nothing"),
    Mutant("gradstore/storage/object_lock.py", "_LOOKS_AFTER = 0.5", "_LOOKS_AFTER = 1.0",
           f"{OBJECT_LOCK}::test_a_holder_looks_while_what_it_sends_still_has_time_to_arrive"),
    Mutant("gradstore/storage/bucket.py", "            self.guard(keys)\n", "",
           f"{LATE}::test_a_write_is_not_sent_again_once_another_has_the_lock"),
    Mutant("gradstore/storage/objects.py", "if not self.late_writes:  # a service", "if True:  #",
           f"{LATE}::test_a_root_that_lands_late_does_not_lower_the_schema"),
    Mutant("gradstore/storage/leases.py", 'return f"{LEASES}/{files.group}" if files.group else',
           "return", f"{LATE}::test_a_choice_that_lands_late_is_none_of_the_next_group "
           f"{LATE}::test_a_clean_up_that_lands_late_takes_nothing_that_the_next_group_agreed_on"),
    Mutant("gradstore/store/unit_files.py", "whole = _late_unit(files, record)", "whole = None",
           f"{LATE}::test_a_unit_is_of_one_computation_though_parts_of_another_land_while_it_is"
           "_written"),
    Mutant("gradstore/store/unit_files.py", "        return files.supplant(staged, path)\n",
           "        return False\n",
           f"{LATE}::test_a_unit_is_of_one_computation_though_parts_of_another_land_while_it_is"
           "_written"),
    Mutant("gradstore/store/own_units.py", "if path == record or not files.late_writes:",
           "if True:", f"{LATE}::test_nothing_left_half_written_is_removed_whose_name_is_written"
           "_again"),
    Mutant("gradstore/store/shared_units.py", "if not files.late_writes and not files.has(",
           "if not files.has(",
           f"{LATE}::test_a_choice_whose_answer_was_lost_names_what_is_still_there"),
    Mutant("gradstore/store/space_writer.py", "and not (self._files.late_writes and tries)", "",
           f"{LATE}::test_a_plan_that_lands_late_is_superseded_like_any_that_was_left"),
    Mutant("gradstore/store/cleaning.py", "found.abandoned if files.late_writes else ()", "()",
           f"{LATE}::test_a_commit_that_lands_late_never_names_what_was_removed"),
    Mutant("gradstore/store/forgetting.py",
           "unfinished = left.unfinished if files.late_writes else ()", "unfinished = ()",
           f"{LATE}::test_a_commit_that_lands_late_never_names_what_was_removed"),
    Mutant("gradstore/store/attempts.py", "for c in store.commits for name in c.generations))",
           'for c in store.commits for name in c.generations if c.kind == "generation"))',
           f"{LATE}::test_a_commit_that_lands_late_never_names_what_was_removed"),
    Mutant("gradstore/store/text_writer.py", "    if publish_anew(files, path, data):\n",
           "    if files.publish(path, data):\n",
           f"{LATE}::test_a_text_that_a_dead_writer_left_is_replaced_and_not_removed"),
    Mutant("gradstore/serve/keeping.py", "each.bucket.guard = self._held.bucket.guard", "pass",
           f"{LATE}::test_a_service_that_lost_the_lock_of_its_bucket_changes_nothing_there"),
    Mutant("gradstore/storage/object_lock.py", "return self._files.bucket.swap(LOCK, ",
           "return self._files.bucket.put(LOCK, canonical_json(document)) or True or (",
           OBJECT_LOCK),
    Mutant("gradstore/serve/intake.py", "if not hmac.compare_digest(digest.digest(), expected):",
           "if False:",
           f"{WRITING}::test_a_body_without_its_digest_is_refused_before_anything_is_seen"),
    Mutant("gradstore/serve/intake.py", "if len(data) != size:", "if False:",
           f"{WRITING}::test_a_body_that_ends_early_is_told_apart_from_a_changed_one"),
    Mutant("gradstore/serve/checking.py",
           'raise out_of_order(f"{path} comes before its plan: write {plan_path(name)} first")',
           "raise BadInput(path)",
           f"{WRITING}::test_before_its_plan_nothing_of_a_generation_is_taken"),
    Mutant("gradstore/serve/checking.py", "    check_plan(self._files, store, plan)", "    pass",
           f"{WRITING}::test_a_plan_other_than_the_one_there_is_refused_with_every_difference"),
    Mutant("gradstore/serve/checking.py", "            self._whole(store, commit, where)\n",
           "            pass\n",
           f"{WRITING}::test_a_commit_of_units_that_are_not_finished_or_others_is_refused"),
    Mutant("gradstore/serve/checking.py", "faults = check_unit(self._files, record, deep=True)",
           "faults = []",
           f"{WRITING}::test_each_thing_that_comes_too_early_is_told_what_comes_before"),
    Mutant("gradstore/serve/security.py", "self._write_key is not None and any(writes)",
           "self._write_key is not None",
           f"{WRITING}::test_only_the_key_that_writes_writes_and_only_in_the_header"),
    Mutant("gradstore/serve/writing.py", "if not request.state.may_write:", "if False:",
           f"{WRITING}::test_only_the_key_that_writes_writes_and_only_in_the_header"),
    Mutant("gradstore/serve/removing.py", "        elif where.name in live:\n",
           "        elif False:\n",
           f"{WRITING}::test_what_is_committed_is_not_removed_and_the_rest_is"),
    Mutant("gradstore/serve/keeping.py", "            if tag != if_match:\n",
           "            if False:\n",
           f"{WRITING}::test_of_two_that_change_the_lock_from_the_same_state_one_does"),
    Mutant("gradstore/serve/keeping.py",
           "if writer in self._holders if writer else not self._holders:", "if True:",
           f"{SERVICE}::test_what_a_writer_sent_before_it_lost_the_lock_does_not_come_after_it"),
    Mutant("gradstore/storage/service.py", "wait = float(given) if", "wait = 0.0 if",
           f"{SERVICE}::test_a_server_that_is_busy_is_asked_again_when_it_says"),
    Mutant("gradstore/store/documents.py", "number <= listed else files.read_if_there(path)",
           "number <= listed else None", OBJECTS),
    Mutant("gradstore/store/cleaning.py", "files.remove_tree(path, known)",
           "files.remove_tree(path)", OBJECTS),
    Mutant("gradstore/store/attempts.py", "while plan_read := _unlisted(",
           "while plan_read := None and _unlisted(", OBJECTS),
    Mutant("gradstore/storage/leases.py", "if known != beat:", "if not known:", LEASES),
    Mutant("gradstore/storage/leases.py", "        if self._boot and holder.boot == self._boot and",
           "        if", LEASES),
    Mutant("gradstore/store/shared_units.py", "done = self._carry_out(unit)\n        files.discard",
           "done = name_unit(files, staged) or self._finished(unit)\n        files.discard",
           WORKERS),
    Mutant("gradstore/store/shared_units.py", "if not self._is_settled(unit, settle):", "if True:",
           WORKERS),
    Mutant("gradstore/store/shared_units.py", "left.remove(unit)\n                if not", "if not",
           BEHIND),
    Mutant("gradstore/store/generation_writer.py", " or index in self._being_written", "", BEHIND),
    Mutant("gradstore/storage/local.py", "with self._own_guard:", "if True:", BEHIND),
    Mutant("gradstore/export/smaller.py", "done[part.rows - unit.start] = True", "pass", UNITS),
    Mutant("gradstore/export/smaller.py", "        left.appendleft(first)\n", "", SMALLER),
    Mutant("gradstore/export/units.py", "return bool(lengths)", "return False", UNITS),
    Mutant("gradstore/export/combined.py", "        into.zero_()\n", "", SMALLER),
    Mutant("gradstore/store/building.py", ", room=self.room)", ")",
           f"{STORE}/test_building.py::test_the_room_that_one_set_found_is_that_of_the_others"),
    Mutant("gradstore/capture/recomputing.py", "if key not in self._delivered:", "if True:",
           "tests/gradstore_/capture/test_per_sample.py"),
    Mutant("gradstore/capture/fallback.py", "ran_out = ran_out_of_memory(error)", "ran_out = False",
           CAPTURE),
    Mutant("gradstore/export/units.py", "cheapest[start] = costs[taken[start] - 1] + start_cost",
           "cheapest[start] = costs[taken[start] - 1]", "tests/gradstore_/export/test_export.py"),
    Mutant(FILLING, "self._wait(most=self._behind - 1)", "self.look()", BEHIND),
    Mutant(FILLING, "            self._start(done)\n",
           "            self._start(done)\n            self.settle()\n", BEHIND),
    Mutant(FILLING, "                self.settle()\n            finally",
           "                pass\n            finally", BEHIND),
    Mutant(FILLING, "                wait(self._on_their_way)\n            return",
           "                pass\n            return", BEHIND),
    Mutant(FILLING, "self._failure = self._failure or each.exception()", "pass", BEHIND),
    Mutant(FILLING, "for each in wait(self._on_their_way).done:", "for each in ():", BEHIND),
    Mutant(FILLING, "max(counted, self._bad_before + len(self._non_finite))", "counted", BEHIND),
    Mutant(FILLING, "elsewhere, idle=self.settle", "elsewhere", BEHIND),
    Mutant("gradstore/store/writer.py", "self._files.end()", "pass", BEHIND),
    Mutant("dataflex/features/shared.py", "        sink.look()", "        pass",
           "tests/dataflex_/features/test_shared.py"),
    Mutant("gradstore/store/worker_group.py", "OwnUnits(files, plan, sha).finished(plan.units)",
           "pass", WORKERS),
    Mutant("gradstore/store/worker_group.py", "{*plans, *ever_committed(store)}",
           "set(ever_committed(store))", WORKERS),
    Mutant("gradstore/store/worker_group.py", "for sha in [] if files.late_writes else",
           "for sha in", LATE),
    Mutant("dataflex/features/engines.py", "self.deaths[number] <= RESTARTS",
           "self.deaths[number] < RESTARTS", ACTORS),
    Mutant("dataflex/features/engines.py", 'rest = ("" if again', 'rest = ("" if not again',
           ACTORS),
    Mutant("dataflex/features/engines.py", "if NODE_DIED in str(error) else", "if False else",
           ACTORS),
    Mutant("dataflex/features/engines.py", "while any(actor.works for", "while any(False for",
           ACTORS),
    Mutant("gradstore/scoring/engines.py", "if generation.commit_sha != seal:", "if False:", SCANS),
    Mutant("gradstore/scoring/engines.py", "if len(generations) != len(trains):", "if False:",
           SCANS),
    Mutant("gradstore/scoring/engines.py", "len(running) < cluster.actors", "True", SCANS),
    Mutant("gradstore/scoring/engines.py", "summed.chunk(start + low, here)",
           "summed.chunk(low, here)", SCANS),
    Mutant("gradstore/scoring/engines.py", "yield done.pop(kept)", "yield done.pop(max(done))",
           SCANS),
    Mutant("gradstore/store/held.py", "held.sync_directory(COMMITS)", "pass",
           f"{POWER}::test_fault_17_a_clean_up_goes_on_after_a_kill_and_a_power_loss_spoils"
           "_nothing_then"),
    Mutant("gradstore/store/generation_writer.py", "self._files.sync_directory(COMMITS)", "pass",
           f"{POWER}::test_fault_17_a_worker_killed_before_a_folder_is_synced_and_then_a_power"
           "_loss_lose_nothing"),
    Mutant("gradstore/store/generation_writer.py",
           "self._files.sync_directory(parent_of(unit_path(self.name, 0)))", "pass",
           f"{POWER}::test_fault_17_a_worker_killed_before_a_folder_is_synced_and_then_a_power"
           "_loss_lose_nothing"),
    Mutant("gradstore/store/space_writer.py",
           "            files.sync_directory(parent_of(path))\n            return sha",
           "            return sha",
           f"{POWER}::test_fault_17_a_kill_before_a_folder_is_synced_and_then_a_power_loss_lose"
           "_nothing"),
    Mutant("gradstore/store/forgetting.py", "    _sync_removals(files)\n", "",
           f"{FORGETTING}::test_fault_17_a_kill_before_a_folder_is_synced_and_then_a_power_loss"
           "_bring_no_row_back"),
    Mutant("gradstore/store/unit_files.py", "files.sync_directory(folder)", "pass",
           f"{POWER}::test_fault_17_after_a_power_loss_every_commit_that_returned_is_there_and"
           "_whole"),
    Mutant("gradstore/store/curvature.py", "        if here != expected:", "        if False:",
           f"{DAMAGE}::test_fault_21_every_byte_of_a_small_store_is_reported_when_a_bit_of_it_is"
           "_flipped"),
    Mutant("gradstore/store/attempts.py", "if theirs and before is not None and",
           "if False and theirs and before is not None and", WORKERS),
    Mutant("gradstore/store/text_writer.py", "if shared:\n        found",
           "if False:\n        found", WORKERS),
    Mutant("gradstore/store/writer.py", "        self._lock.acquire()\n", "", LOCK),
    Mutant("gradstore/store/cleaning.py", "sorted(each)[:-keep]", "sorted(each)[keep:]", RUNS),
    Mutant("gradstore/format/codec.py", "values *= scale[:, None]", "values *= 1.0", FORMAT),
    Mutant("gradstore/format/codec.py", "scaled.round_()", "scaled", FORMAT),
    Mutant("gradstore/store/chunks.py", "            self._checked[chunk_of] = True\n",
           "", CHUNKS),
    Mutant("gradstore/store/chunks.py", "if fault is not None:", "if False:", DAMAGE),
    Mutant("gradstore/storage/reading.py", "elif expected_bytes not in (None, found.st_size):",
           "elif False:", CHUNKS),
    Mutant("gradstore/store/chunks.py", "or self._files.whole_only", "", CHUNKS),
    Mutant("gradstore/store/chunks.py", "whole = not self._checked[unit, place]", "whole = False",
           CHUNKS),
    Mutant("gradstore/scoring/scan.py", "if not first <= start <= stop", "if not start <= stop",
           PACKED),
    Mutant("gradstore/scoring/scan.py", "zip(self._readers, range",
           "zip(self._readers[:1] * 99, range", "tests/gradstore_/scoring/test_dtypes.py"),
    Mutant("gradstore/export/joined.py", "slot in hooked and", "True and", JOINED),
    Mutant("gradstore/export/joined.py", "or alike != last or", "or", JOINED),
    Mutant("gradstore/export/projected.py", "capture.hooked if self.joins",
           "capture.slots if self.joins", "tests/gradstore_/export/test_fused.py"),
    Mutant("gradstore/cluster/connection.py", "probe = self.ask(task.remote)",
           "probe = task.remote()", "tests/gradstore_/cluster/test_connection.py"),
    Mutant("kernels/gradkernels/gpu/hadamard.py", "tl.join(a + b, a - b)",
           "tl.join(a - b, a + b)", "tests/gradkernels_/test_rotation_triton.py"),
    Mutant("kernels/gradkernels/cpu/lookups.py", "SEGMENT = 256", "SEGMENT = 512", SIGNS),
    Mutant("kernels/gradkernels/cpu/lookups.py", "place = (r & 1) *", "place = 0 *",
           SIGNS),
    Mutant("kernels/gradkernels/cpu/signs.py", "np.rint(", "np.floor(", SIGNS),
    Mutant("kernels/gradkernels/cpu/vectors.py", "c, d = builder.fadd(c, d), builder.fsub(c, d)",
           "c, d = builder.fadd(c, d), builder.fsub(d, c)", FORMAT),
    Mutant("kernels/gradkernels/cpu/loops.py", "if 2 * half == size:", "if False:", FORMAT),
    Mutant("gradstore/similarity/index.py", "if file.read() != numbers:", "if False:", INDEX),
    Mutant("gradstore/similarity/index.py", "np.lexsort((rows, -scores), axis=1)",
           "np.lexsort((-rows, -scores), axis=1)", INDEX),
    # -- features: losses, moments, projections --
    Mutant("gradstore/capture/losses.py", "shifted = labels[:, 1:]", "shifted = labels[:, :-1]",
           CAPTURE),
    Mutant("gradstore/capture/losses.py", "self.counts[self.rows].float().reciprocal()",
           "torch.ones_like(self.rows).float()", CAPTURE),
    Mutant("gradstore/export/moments.py", "zip(sorted(groups), parameters, strict=True)",
           "zip(sorted(groups), sorted(parameters), strict=True)",
           CHECKPOINTS + "/test_folders.py"),
    Mutant("gradstore/export/moments.py", 'enumerate(("exp_avg", "exp_avg_sq"))',
           'enumerate(("exp_avg_sq", "exp_avg"))', MOMENTS),
    Mutant("gradstore/export/features.py", "constants.beta1 ** (constants.step + 1)",
           "constants.beta1 ** constants.step", FEATURES),
    Mutant("gradstore/export/features.py", "base, outer = base + outer, 0.0", "outer = 0.0",
           FEATURES),
    Mutant("gradstore/export/features.py", "constants.beta1, 1.0 - constants.beta2",
           "constants.beta1, 1.0 - constants.beta1", FEATURES),
    Mutant("kernels/gradkernels/cpu/normals.py", "((bits >> _U9) << _U1) + _U1",
           "(bits >> _U9) << _U1", "tests/gradkernels_/test_projection_randomness.py"),
    Mutant("kernels/gradkernels/cpu/normals.py", "exponent * _LN2_LOW - ", "- ",
           "tests/gradkernels_/test_projection_randomness.py"),
    Mutant("kernels/gradkernels/cpu/sums.py", ".mT.reshape(rows, width)", ".reshape(rows, width)",
           PROJECTION),
    Mutant("kernels/gradkernels/cpu/int8.py", "_BASE, _LARGEST = 255, 32_512",
           "_BASE, _LARGEST = 127, 16_256", BYTES),
    Mutant("kernels/gradkernels/cpu/int8.py", "self._keys, c, _OCTETS",
           "self._keys, self._offsets[: len(c)], _OCTETS", BYTES),
    Mutant("kernels/gradkernels/features.py", "block, value=-1.0)", "block, value=1.0)", FEATURES),
    Mutant("gradstore/export/pooling.py", '"position": rank * counts,', '"position": rank,',
           "tests/gradstore_/export/test_embeddings.py"),
    Mutant("kernels/gradkernels/methods.py", "1 / math.sqrt(s)", "1 / math.sqrt(d)", PROJECTION),
    Mutant("kernels/gradkernels/methods.py", "stream=2", "stream=4",
           "tests/gradkernels_/test_projection_randomness.py"),
    Mutant("kernels/gradkernels/randomness.py", "spec.seed >> 32)", "0)",
           "tests/gradkernels_/test_projection_randomness.py"),
    Mutant("dataflex/checkpoints/weights.py", "if pair[0] in decayed] + [", "] + [", CHECKPOINTS),
    # -- scores and what is chosen --
    Mutant("gradstore/scoring/subtasks.py", "queries[index] /= kept.size", "pass", INFLUENCE),
    Mutant("gradstore/scoring/combine.py", "one.weight * found", "found",
           INFLUENCE),
    Mutant("gradstore/scoring/influence.py", 'if mode == "max" else', 'if mode != "max" else',
           INFLUENCE),
    Mutant("gradstore/scoring/influence.py", "np.asarray(shares / shares.sum(), ",
           "np.asarray(shares, ",
           f"{INFLUENCE} gradstore/scoring/influence.py"),
    Mutant("gradstore/scoring/scan.py", "wide /= np.where(norm > 0, norm, 1.0)[:, None]", "",
           INFLUENCE),
    Mutant("gradstore/scoring/selection.py", 'np.argsort(-values[rows], kind="stable")[:count]',
           'np.argsort(values[rows], kind="stable")[::-1][:count]', SELECTION),
    Mutant("gradstore/scoring/selection.py", "int(Decimal(repr(float(fraction))) * usable)",
           "int(fraction * usable)", SELECTION),
    Mutant("dataflex/trainers/select.py", "default_rng([seed, stage])", "default_rng([stage])",
           "tests/dataflex_/trainers/test_select.py"),
    Mutant("dataflex/selectors/icons.py", "1.0 - count / n", "count / n",
           SELECTORS + "/test_icons.py"),
    Mutant("dataflex/selectors/near.py", "    served[:] = False\n", "",
           SELECTORS + "/test_near.py"),
    Mutant("dataflex/selectors/delta_loss.py", "deltas = baseline - losses",
           "deltas = losses - baseline",
           SELECTORS + "/test_delta_loss.py"),
    Mutant("dataflex/selectors/delta_loss.py", "min(int(start + span), fell)", "int(start + span)",
           SELECTORS + "/test_delta_loss.py"),
    Mutant("dataflex/selectors/mirror.py", "before[:, None] - after", "after - before[:, None]",
           SELECTORS + "/test_mirror.py"),
    Mutant("dataflex/selectors/mirror.py", "board = board.view(max_age=0)", "pass",
           SELECTORS + "/test_mirror.py"),
    Mutant("dataflex/models/trained.py", "default_rng([*seed, epoch])", "default_rng(seed)",
           "tests/dataflex_/models/test_trained.py"),
    Mutant("dataflex/selectors/loss.py", "default_rng(self.seed + context.step)",
           "default_rng(self.seed)", SELECTORS + "/test_selectors.py"),
    Mutant("dataflex/selectors/cluster_less.py", "self._made.distances[rows], -scores[rows]",
           "-scores[rows], self._made.distances[rows]", SELECTORS + "/test_cluster_less.py"),
    Mutant("dataflex/selectors/tsds.py", "** 2 / sigma**2", "** 2 / sigma",
           SELECTORS + "/test_tsds.py"),
    Mutant("dataflex/selectors/rds_plus.py", 'pooling="position"', 'pooling="mean"',
           SELECTORS + "/test_rds_plus.py"),
    Mutant("dataflex/selectors/turns.py", "self.next = (self.next + count) % targets",
           "self.next = 0", SELECTORS + "/test_rds_plus.py"),
    Mutant("gradstore/similarity/neighbours.py", "cosines[~allowed[rows[here]]] = np.nan",
           "cosines[~allowed[here]] = np.nan", "tests/gradstore_/similarity/test_neighbours.py"),
    Mutant("dataflex/selectors/bm25.py", "            allowed[rows] = False\n", "",
           SELECTORS + "/test_bm25.py"),
    Mutant("dataflex/selectors/bm25.py", "            self._turns = Turns()\n        return rows",
           "            pass\n        return rows", SELECTORS + "/test_bm25.py"),
    Mutant("gradstore/similarity/bm25.py", "letters}+(?:[{marks}]+{letters}*)*", "letters}+",
           "tests/gradstore_/similarity/test_bm25.py"),
    Mutant("dataflex/selectors/online.py", "self._lap, self._offset = self._lap + 1, 0",
           "self._offset = 0", SELECTORS + "/test_online.py"),
    Mutant("dataflex/selectors/online.py", "default_rng([self.seed, context.step, number])",
           "default_rng([self.seed, number])", SELECTORS + "/test_online.py"),
    Mutant("dataflex/selectors/online.py", "found.mean(dim=0)", "found[0]",
           SELECTORS + "/test_online.py"),
    Mutant("gradstore/scoring/joint_choice.py", "beside += among[:, best]",
           "beside = among[:, best]", "tests/gradstore_/scoring/test_joint_choice.py"),
    Mutant("gradstore/scoring/joint_choice.py", "np.diagonal(among) / 2", "np.diagonal(among)",
           "tests/gradstore_/scoring/test_joint_choice.py"),
    Mutant("gradstore/capture/per_sample.py", "current.unfit(slot)} | elsewhere",
           "current.unfit(slot)}", DENSE),
    Mutant("gradstore/capture/per_sample.py", "covered = self._hooked & self._called",
           "covered = set(self._hooked)", ROWS),
    Mutant("gradstore/capture/hooks.py", "x.shape[:2] == self._grid", "x.shape[0] == self._rows",
           ROWS),
    Mutant("gradstore/capture/scaling.py", "gradient.float() / self._scale",
           "gradient.float() * self._scale", SCALING),
    Mutant("gradstore/capture/per_sample.py", "if rows == tokens > 1:", "if False:", ROWS),
    Mutant("gradstore/capture/fallback.py", '"labels": _labels(targets)',
           '"labels": batch["labels"]', CAPTURE),
    Mutant("gradstore/capture/lora.py", "apply(x, anchor, call)", "apply(x, x, call)",
           ONE_OPERATION),
    Mutant("gradstore/capture/lora.py", "if name in layer.lora_variant:", "if False:",
           ONE_OPERATION),
    Mutant("gradstore/capture/lora.py", "for kind in _HOOKS) != hooks",
           "for kind in _HOOKS[2:]) > 2", ONE_OPERATION),
    Mutant("gradstore/capture/lora.py", "addmm_(low_gradient, down)", "clone()",
           ONE_OPERATION),
    Mutant("gradstore/capture/lora.py", "matrix.bias is not None", "matrix.bias is matrix",
           ONE_OPERATION),
    Mutant("gradstore/capture/lora.py", "len(dtypes) == 1", "len(dtypes) > 0", ONE_OPERATION),
    Mutant("gradstore/capture/lora.py", "stack.callback(_put_back, layer.module, ours)", "pass",
           ONE_OPERATION),
    Mutant("gradstore/capture/lora.py", "if layer.disable_adapters or layer.merged:", "if False:",
           ONE_OPERATION),
    Mutant("gradstore/capture/lora.py", "torch.compiler.is_compiling() or ", "", ONE_OPERATION),
    Mutant("gradstore/capture/lora.py", " or x.is_inference()", "", ONE_OPERATION),
    Mutant("gradstore/capture/lora.py", " and torch.float64 not in dtypes", "", ONE_OPERATION),
    Mutant("gradstore/capture/lora.py", "_home(nn.Linear.forward) != _TORCH_LAYER", "False",
           ONE_OPERATION),
    Mutant("gradstore/capture/losses.py", "with _head_at(head, targets):",
           "with torch.enable_grad(), _head_at(head, targets):", ONE_OPERATION),
    Mutant("gradstore/capture/dense.py", "low = (part.start - slot.start) // slot.width",
           "low = 0", DENSE),
    Mutant("gradstore/capture/dense.py", "for other in sums[1:]:", "for other in sums[2:]:", DENSE),
    Mutant("gradstore/capture/row_sums.py", "here &= self.tokens != self.padding", "pass", DENSE),
    Mutant("gradstore/capture/dense.py", "flat[self._empty] = 0.0", "pass", DENSE),
    Mutant("gradstore/export/features.py", "low = slot.start - self._starts[slot.name]", "low = 0",
           WHOLE),
    Mutant("gradstore/export/gradient_space.py", "*self.left_out]", "]", WHOLE),
    Mutant("gradstore/capture/products.py", "gram[rows, earlier] += crossed.T",
           "gram[rows, earlier] += 0", "tests/gradstore_/capture/test_products.py"),
    Mutant("dataflex/rewards/policy_gradient.py", "(rewards.sum() - rewards) / (len(rewards) - 1)",
           "rewards.mean()", SELECTORS + "/test_nice.py"),
    Mutant("dataflex/config/secrets.py", "sorted({secret, *quoted, *escaped}, ",
           "sorted({secret}, ", "tests/dataflex_/config/test_secrets.py"),
    # -- mixtures, weights, orders, schedules, ranks, resumes --
    Mutant("dataflex/data/mixture.py", "(counts[d] - quotas[d], d)", "(counts[d] - quotas[d], -d)",
           MIXTURE),
    Mutant("dataflex/data/mixture.py", "(seed, d))", "(seed, 0))", MIXTURE),
    Mutant("dataflex/data/mixture.py", "+ eps / len(weights))", "+ eps)",
           f"{MIXERS} {DOREMI} {MIXTURE}"),
    Mutant("dataflex/mixers/odm.py", "np.divide(share * mean,", "np.divide(mean,", MIXERS),
    Mutant("dataflex/mixers/odm.py", "exploration(k, step - 1, self.floor)",
           "exploration(k, step, self.floor)", MIXERS),
    Mutant("dataflex/mixers/doremi.py", "scaled = len(shares) * shares",
           "scaled = np.ones_like(shares)",
           DOREMI),
    Mutant("dataflex/mixers/doremi.py", "np.maximum(excess, 0.0)", "excess", DOREMI),
    Mutant("dataflex/mixers/doremi.py", "np.asarray(self.summed_weights / self.updates)",
           "self.domain_weights", DOREMI),
    Mutant("dataflex/mixers/dynamic_moe.py", "np.divide(counts, totals,", "np.divide(counts, 1.0,",
           "tests/dataflex_/mixers/test_dynamic_moe.py"),
    Mutant("dataflex/weighters/loss.py", "(score - score.max()) / r)", "score - score.max())",
           WEIGHTERS),
    Mutant("dataflex/weighters/joint_update_aware.py", "_Objective(s, beta * g)",
           "_Objective(s, g)", WEIGHTERS),
    Mutant("dataflex/run/queue.py", "failed = desk.closed(arrived) or failed",
           "desk.closed(arrived)", "tests/dataflex_/run/test_queue.py"),
    Mutant("dataflex/trainers/weights.py", "tokens.sum() / (weights * tokens).sum()",
           "len(tokens) / weights.sum()", WEIGHTS),
    Mutant("dataflex/trainers/loss_seam.py", "of_row[targets.rows] * token_losses",
           "of_row.mean() * token_losses", SEAM),
    Mutant("dataflex/reorders/patterns.py", "stride[::-1] if i % 2", "stride[::-1] if not i % 2",
           "tests/dataflex_/reorders/test_patterns.py"),
    Mutant("dataflex/run/schedule.py", "stop = stage_start + self.warmup_step",
           "stop = stage_start + self.warmup_step + 1",
           SCHEDULE),
    Mutant("dataflex/data/order.py", "default_rng([*self.seed, lap])", "default_rng([*self.seed])",
           ORDER),
    Mutant("dataflex/data/order.py", "in grid[:, rank]]", "in grid[:, 0]]", ORDER),
    Mutant("dataflex/run/ranks.py", "work[self.rank :: self.world]", "work[:: self.world]", RANKS),
    Mutant("dataflex/run/ranks.py", "np.sum(self.gather(", "np.mean(self.gather(", RANKS),
    Mutant("dataflex/run/ranks.py", "raise own or RemoteFailure(failed)", "pass", RANKS),
    Mutant("dataflex/checkpoints/folders.py", "previous < at <= step", "at <= step", CHECKPOINTS),
    Mutant("dataflex/checkpoints/folders.py", "in reversed(checkpoints(output_dir)):",
           "in checkpoints(output_dir):", CHECKPOINTS + "/test_seal.py"),
    Mutant("dataflex/checkpoints/folders.py", "if run_id not in (None, run_id_of(path)):",
           "if False:", CHECKPOINTS + "/test_seal.py"),
    Mutant("dataflex/checkpoints/folders.py", "sorted(found)]", "found]",
           CHECKPOINTS + "/test_folders.py"),
    Mutant("dataflex/checkpoints/seal.py", "if digest != listed[name].sha256:", "if False:",
           CHECKPOINTS + "/test_seal.py"),
    Mutant("dataflex/trainers/sealing.py", "self._limit(None)", "self._limit(1)",
           "tests/dataflex_/trainers/test_sealing.py"),
    Mutant("gradstore/store/cleaning.py", "            os.rename(renamed, path)",
           "            pass", "tests/gradstore_/store/test_cleaning.py"),
    Mutant("dataflex/trainers/row_seam.py", "            self._serve(self._interval, state.step)",
           "            self._serve(self._interval, self._interval.start)",
           "tests/dataflex_/trainers"),
]  # fmt: skip


def main(words: list[str]) -> int:
    """Run the mutants that hold one of the words, and tell how each ended."""
    chosen = [m for m in MUTANTS if not words or any(w in f"{m.file} {m.text}" for w in words)]
    ends: dict[str, list[Mutant]] = {"noticed": [], "SURVIVED": [], "OUT OF DATE": []}
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "tree"
        copy_tree(copy)
        prepare(copy)
        if run_tests(copy, sorted({test for m in chosen for test in m.tests.split()}), (0,)):
            print("the tests fail without any mistake: mend that first")
            return 2
        for number, mutant in enumerate(chosen, start=1):
            began = time.perf_counter()
            end = tried(copy, mutant)
            ends[end].append(mutant)
            print(f"{number}/{len(chosen)} {end} in {time.perf_counter() - began:.0f} s: "
                  f"{mutant.file}: {mutant.text.strip()!r}", flush=True)  # fmt: skip
    print(", ".join(f"{len(found)} {end}" for end, found in ends.items()))
    return 2 if ends["OUT OF DATE"] else 1 if ends["SURVIVED"] else 0


def copy_tree(copy: Path) -> None:
    """Copy what git tracks, or would track, as it is in the working tree."""
    listed = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(listed, cwd=ROOT, check=True, capture_output=True, text=True).stdout
    for name in filter(None, names.split("\0")):
        if (ROOT / name).is_file():  # not a file that was deleted and is still in the index
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, copy / name)


def tried(copy: Path, mutant: Mutant) -> str:
    """Plant a mistake, run its tests, take it out again; return how it ended."""
    file = copy / mutant.file
    right = file.read_text(encoding="utf-8")
    if right.count(mutant.text) != 1 or mutant.text == mutant.instead:
        print(f"  its text is {right.count(mutant.text)} times in the file")
        return "OUT OF DATE"
    file.write_text(right.replace(mutant.text, mutant.instead), encoding="utf-8")
    try:
        code = run_tests(copy, mutant.tests.split())
    finally:
        file.write_text(right, encoding="utf-8")
    return {0: "SURVIVED", 1: "noticed", -signal.SIGALRM: "noticed"}.get(code, "OUT OF DATE")


def run_tests(
    copy: Path, tests: list[str], expected: tuple[int, ...] = (0, 1, -signal.SIGALRM)
) -> int:
    """Run tests of the copy in a child process; return pytest's exit code, explain another one."""
    with tempfile.TemporaryFile() as told:
        child = os.fork()
        if child == 0:
            try:
                os.chdir(copy)
                os.dup2(told.fileno(), 1)
                os.dup2(told.fileno(), 2)
                signal.alarm(LONGEST)  # of a mistake that makes its tests wait for ever
                code = int(pytest.main([*OPTIONS, *tests]))
            except BaseException:  # of any kind: a child must never return into its parent's code
                traceback.print_exc()
                code = 3
            sys.stdout.flush()
            os._exit(code)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        if code not in expected:
            told.seek(0)
            print(told.read().decode(errors="replace")[-2000:])
        return code


def prepare(copy: Path) -> None:
    """Import what takes long once, for all children; let them import our packages from the copy."""
    # Bytecode is told by times in whole seconds: a mistake and its removal may share one.
    sys.dont_write_bytecode = True
    paths = [str(copy), str(copy / "kernels")]
    sys.path[:0] = paths
    os.environ.update({"PYTHONPATH": os.pathsep.join(paths), "PYTHONDONTWRITEBYTECODE": "1",
                       "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"})  # fmt: skip
    for name in HEAVY:
        importlib.import_module(name)
    ours = [n for n in sys.modules if n.split(".")[0] in ("dataflex", "gradstore", "gradkernels")]
    assert not ours, f"imported before a mistake could be planted: {ours}"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
