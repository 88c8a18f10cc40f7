"""Which tests accept which requirement, and the hook that holds a full run against it.

A full run (no selection by path, name or mark) fails if a test that accepts a requirement was
skipped, deselected or is missing. A name without parameters stands for all of its cases.
"""

from __future__ import annotations

from collections.abc import Mapping

import pytest

_SAVER = "tests/conformance/test_saver.py"
_SUITE = f"{_SAVER}::TestPostgres"  # inherits the shipped suites, as the other backends do
_STORE = "tests/conformance/test_run_store.py"
_CLAIMS = "tests/conformance/test_run_store_claims.py"
_WAITS = "tests/conformance/test_run_store_waits.py"
_GRAPHS = "tests/integration/test_checkpointed_graphs.py"
_RUNS = "tests/integration/test_runs.py"
_RESUME = "tests/integration/test_resume_cases.py"
_SPANS = "tests/integration/test_telemetry.py"
_URLS = "tests/integration/test_database_urls.py"
_DAMAGE = "tests/integration/test_damage.py"
_OFFLOAD = "tests/integration/test_offload.py"
_ARCHIVE = "tests/integration/test_archive.py"
_DEPLOYS = "tests/fault/test_deploys.py"
_TRANSFER = "tests/integration/test_transfer.py"
_GOLDEN = "tests/integration/test_golden"
_VERSIONS = "tests/integration/test_versions.py"
_VALUES = "tests/unit/test_serializer.py"
_RETRY = "tests/unit/test_retry.py"
_INPUTS = "tests/unit/test_inputs.py"
_TASKS = "tests/integration/test_tasks.py"
_TASK_GRAPH = "tests/unit/test_task_graph.py"
_OUTAGE = "tests/fault/test_outage.py"
_TASK_KILLS = "tests/fault/test_task_kills.py"
_AGENT_KILLS = "tests/fault/test_agent_kills.py"
_KILLS = "tests/fault/test_kills.py"
_EFFECT_KILLS = "tests/fault/test_effects.py"
_MISBEHAVIOUR = "tests/fault/test_misbehaviour.py"
_LETTERS = "tests/conformance/test_run_store_letters.py"
_PROCESSES = "tests/integration/test_cli_processes.py"
_RECORDS = "tests/acceptance/test_records.py"
_HOSTS = "tests/acceptance/test_hosts.py"
_GROWTH = "tests/integration/test_growth.py"
_STEPS = "tests/acceptance/test_steps.py"

REQUIREMENTS: Mapping[str, tuple[str, ...]] = {
    "S0-1": (
        f"{_VALUES}::test_every_supported_type_comes_back_equal_and_of_its_type",
        f"{_VALUES}::test_any_state_comes_back_equal",
        f"{_VALUES}::test_unstorable_value_is_refused_with_path_type_and_advice",
        f"{_RUNS}::test_unstorable_state_fails_the_run_naming_channel_path_and_type",
    ),
    "S0-3": (
        f"{_STEPS}::test_every_step_is_a_checkpoint_and_a_run_killed_behind_it_goes_on_with_the_next",
    ),
    "S0-4": (f"{_KILLS}::test_run_killed_at_any_place_ends_as_its_twin",),
    "S0-5": (
        f"{_EFFECT_KILLS}::test_worker_killed_around_an_effect_pays_once",
        f"{_EFFECT_KILLS}::test_call_that_happened_unheard_of_is_not_repeated",
    ),
    "S0-7": (f"{_KILLS}::test_run_killed_at_any_place_ends_as_its_twin",),
    "S0-8": (
        f"{_VALUES}::test_stored_bytes_of_version_one_are_still_read",
        f"{_VALUES}::test_newer_version_is_named",
        "tests/unit/test_fingerprints.py::test_golden_fingerprint_is_still_read_and_made",
        f"{_TRANSFER}::test_run_that_the_first_version_exported_goes_on",
        f"{_GOLDEN}_database.py::test_runs_and_approvals_are_listed_as_they_were",
        f"{_GOLDEN}_second.py::test_everything_is_listed_as_it_was_and_nothing_is_damaged",
        f"{_GOLDEN}_third.py::test_everything_is_listed_with_its_version_and_nothing_is_damaged",
        f"{_GOLDEN}_third.py::test_each_run_goes_on_and_nothing_is_done_twice",
    ),
    "S0-9": (
        f"{_VERSIONS}::test_run_that_a_newer_program_has_stored_waits_for_one",
        f"{_VERSIONS}::test_verdict_is_right_about_each_change_from_where_the_run_stands",
        f"{_TRANSFER}::test_file_that_was_changed_is_refused_and_nothing_is_left",
        "tests/unit/test_fingerprints.py::test_fingerprint_of_a_newer_program_is_refused",
        "tests/integration/test_migrations.py::test_newer_database_is_refused_and_left_alone",
    ),
    "S0-10": (
        f"{_DEPLOYS}::test_rolling_deploy_under_waiting_runs",
        f"{_VERSIONS}::test_run_goes_on_with_what_changed_behind_it_and_that_is_noted",
    ),
    "S0-11": (
        "tests/fault/test_soak.py::test_random_kills_and_stops_lose_nothing",
        f"{_KILLS}::test_run_killed_at_any_place_ends_as_its_twin",
    ),
    "S0-12": (f"{_HOSTS}::test_run_goes_on_when_the_machine_that_began_it_is_lost_with_its_disk",),
    "S0-13": (
        f"{_PROCESSES}::test_a_run_is_submitted_driven_approved_and_finished_by_separate_processes",
    ),
    "S0-16": (f"{_HOSTS}::test_ten_thousand_suspended_runs_cost_a_worker_nothing",),
    "S0-17": (
        f"{_RUNS}::test_events_are_followed_to_the_end_and_resumed_by_number",
        f"{_STORE}::test_audit_log_is_gapless_and_its_hashes_recompute",
    ),
    "S0-19": (
        f"{_CLAIMS}::test_beginning_of_an_attempt_is_noted_with_reason_and_checkpoint",
        f"{_SPANS}::test_resumed_segment_is_a_new_trace_linked_to_the_previous_one",
    ),
    "S0-21": (
        f"{_VERSIONS}::test_verdict_is_right_about_each_change_from_where_the_run_stands",
        "tests/unit/test_fingerprints.py::test_whatever_a_node_calls_by_name_counts",
        f"{_VERSIONS}::test_policy_of_the_graph_and_of_the_kind_of_change_decides",
        f"{_VERSIONS}::test_refused_run_is_paused_told_by_doctor_and_goes_on_when_resumed",
        f"{_DEPLOYS}::test_migration_goes_on_wherever_its_process_is_killed",
    ),
    "S0-22": (
        f"{_GROWTH}::test_each_checkpoint_costs_so_many_bytes_and_statements",
        f"{_GROWTH}::test_twice_the_steps_store_twice_as_much",
    ),
    "S0-23": (
        "tests/integration/test_encryption.py::test_no_payload_is_in_any_file_of_the_database",
        "tests/integration/test_redaction.py::test_hook_sees_every_payload_of_a_run_as_what_it_is",
    ),
    "S0-24": ("tests/fault/test_soak.py::test_random_kills_and_stops_lose_nothing",),
    "S1-1": (
        f"{_TASKS}::test_snapshot_is_names_to_results_as_json_during_a_run_and_after_it",
        f"{_TASKS}::test_snapshot_is_a_copy",
    ),
    "S1-2": (f"{_TASK_GRAPH}::test_any_graph_with_any_snapshot_ends_as_the_model_says",),
    "S1-3": (f"{_TASK_GRAPH}::test_any_graph_with_any_snapshot_ends_as_the_model_says",),
    "S1-4": (
        f"{_TASK_GRAPH}::test_any_graph_with_any_snapshot_ends_as_the_model_says",
        f"{_TASK_GRAPH}::test_snapshot_of_any_moment_leads_to_the_same_end",
        f"{_TASK_KILLS}::test_snapshot_of_every_moment_leads_another_process_to_the_same_end",
    ),
    "S1-5": (
        f"{_TASKS}::test_what_has_not_succeeded_is_evaluated_again",
        f"{_TASKS}::test_cancelled_run_says_so_of_what_has_no_result_and_is_evaluated_again",
        f"{_TASKS}::test_failure_that_may_be_passed_is_passed_after_hydration_too",
    ),
    "S1-6": (
        f"{_TASKS}::test_snapshot_is_names_to_results_as_json_during_a_run_and_after_it",
        f"{_TASK_GRAPH}::test_what_is_no_snapshot_is_refused_by_place",
        f"{_TASKS}::test_result_that_json_cannot_hold_is_a_failure_by_name",
    ),
    "S1-7": (
        f"{_TASKS}::test_context_may_be_anything_and_is_not_stored",
        f"{_TASKS}::test_run_stops_at_a_context_that_is_missing_and_goes_on_with_it",
    ),
    "S1-8": (f"{_TASKS}::test_nothing_is_begun_without_the_context_that_a_task_names",),
    "S1-9": (
        f"{_TASK_KILLS}::test_tasks_that_had_succeeded_before_a_kill_are_not_run_again",
        f"{_TASKS}::test_deploy_in_the_middle_goes_on_with_the_new_code",
        f"{_TASKS}::test_paused_run_goes_on_by_its_id",
    ),
    "S1-10": (f"{_AGENT_KILLS}::test_calls_whose_outcome_is_durable_are_not_made_again",),
    "S1-11": (
        f"{_TASK_KILLS}::test_effect_of_a_task_that_was_killed_behind_it_does_not_happen_again",
    ),
    "S1-12": (
        f"{_TASKS}::test_store_that_fails_in_the_middle_costs_no_finished_task",
        f"{_OUTAGE}::test_tasks_go_on_where_they_were_when_their_server_was_stopped",
    ),
    "S1-13": (
        f"{_TASKS}::test_result_of_a_task_that_is_no_more_is_carried_along_with_a_warning",
        f"{_TASKS}::test_task_that_the_snapshot_does_not_know_is_run",
    ),
    "S2-1": (f"{_RUNS}::test_result_is_there_for_another_process",),
    "S2-2": (f"{_RECORDS}::test_versions_count_one_up_with_each_commit_and_no_other_is_taken",),
    "S2-3": (f"{_STEPS}::test_cursor_counts_the_committed_steps_wherever_a_process_was_killed",),
    "S2-4": (
        f"{_STORE}::test_only_the_changes_in_the_table_of_statuses_are_legal",
        f"{_STORE}::test_each_verb_changes_a_run_only_as_the_table_allows",
    ),
    "S2-6": (f"{_RECORDS}::test_history_is_of_step_time_and_hash_and_cannot_be_changed",),
    "S2-7": (f"{_RUNS}::test_exhausted_run_is_a_dead_letter_with_its_cause",),
    "S2-8": (f"{_SUITE}::test_loaded_values_cannot_change_what_is_stored",),
    "S2-9": (
        f"{_GRAPHS}::test_any_checkpoint_can_be_continued_and_the_branch_is_the_latest",
        f"{_GRAPHS}::test_update_of_an_old_checkpoint_branches",
    ),
    "S2-10": (
        "tests/integration/test_sagas.py::test_failure_at_any_step_undoes_what_came_before_it_the_last_first",
        f"{_EFFECT_KILLS}::test_worker_killed_while_it_undoes_a_run_undoes_all_of_it_in_order",
    ),
    "S2-11": (
        f"{_EFFECT_KILLS}::test_worker_killed_around_an_effect_pays_once",
        "tests/integration/test_effects.py::test_key_names_an_effect_in_its_run_or_in_the_tenant",
    ),
    "S2-13": (
        f"{_RUNS}::test_bad_submissions_leave_no_row",
        f"{_INPUTS}::test_input_that_does_not_fit_is_refused_by_place",
    ),
    "S2-14": (
        f"{_SUITE}::test_failed_write_fails_the_checkpoint_that_follows_it",
        f"{_SUITE}::test_reader_does_not_make_a_failed_write_forgotten",
        f"{_SAVER}::test_torn_write_leaves_the_old_checkpoint",
        f"{_GRAPHS}::test_failed_checkpoint_stops_the_graph_and_finished_nodes_are_not_run_again",
        f"{_GRAPHS}::test_unstorable_write_stops_the_graph_before_the_next_node",
    ),
    "S2-15": (f"{_KILLS}::test_run_killed_at_any_place_ends_as_its_twin",),
    "S2-18": (
        f"{_OFFLOAD}::test_large_value_is_neither_copied_nor_stored_again_by_the_steps_after",
        f"{_ARCHIVE}::test_all_kinds_of_threads_come_back_as_they_were",
        f"{_ARCHIVE}::test_restored_thread_is_resumed",
    ),
    "S2-19": (
        f"{_MISBEHAVIOUR}::test_node_that_ends_its_process_ends_in_the_dead_letter_and_others_do_not",
        f"{_MISBEHAVIOUR}::test_what_cannot_be_stored_or_said_fails_its_run_by_name_and_no_other",
        "tests/integration/test_stops.py::test_langgraphs_timeout_of_an_async_node_fails_the_attempt_and_counts",
        "tests/fault/test_zombies.py::test_stopped_worker_that_continues_changes_nothing",
    ),
    "S2-20": (
        f"{_SUITE}::test_latest_is_the_newest_put_whatever_the_ids_say",
        f"{_GRAPHS}::test_one_of_two_racing_invocations_gets_a_conflict",
        f"{_GRAPHS}::test_host_whose_clock_is_a_minute_behind_continues_the_newest_checkpoint",
    ),
    "S2-21": (
        f"{_VALUES}::test_changed_byte_is_never_read_as_a_value",
        f"{_VALUES}::test_each_flipped_cut_or_added_byte_is_found",
        f"{_DAMAGE}::test_flipped_byte_is_refused_and_left_as_it_is",
    ),
    "S2-22": (
        f"{_RUNS}::test_failed_attempt_is_retried_and_finished_nodes_are_not_run_again",
        f"{_RUNS}::test_drained_run_is_queued_and_continues_where_it_stopped",
    ),
    "S2-23": (
        f"{_CLAIMS}::test_beginning_of_an_attempt_is_noted_with_reason_and_checkpoint",
        f"{_RESUME}::test_recovery_after_a_delivered_answer_asks_the_next_question",
    ),
    "S2-24": (
        f"{_RETRY}::test_waits_double_up_to_a_minute",
        f"{_RETRY}::test_attempt_one_thousand_waits_a_minute",
        f"{_RETRY}::test_jitter_shortens_by_at_most_a_half",
        f"{_RUNS}::test_backoff_is_a_time_in_the_row",
    ),
    "S2-25": (
        f"{_STORE}::test_failed_run_and_its_dead_letter_come_together",
        f"{_LETTERS}::test_dead_letter_keeps_what_is_needed_to_judge",
        f"{_LETTERS}::test_requeue_works_exactly_once",
        "tests/fault/test_transitions.py::test_process_killed_at_each_transition_leaves_nothing_undone",
    ),
    "S3-1": (f"{_STEPS}::test_run_that_is_saved_at_marked_steps_repeats_what_came_after_them",),
    "S3-2": (f"{_SUITE}::test_listing_filters_limits_and_pages_over_all_threads",),
    "S3-3": (f"{_GRAPHS}::test_any_checkpoint_can_be_continued_and_the_branch_is_the_latest",),
    "S3-4": (
        f"{_RECORDS}::test_record_names_run_step_nodes_that_are_done_state_checkpoint_and_time",
    ),
    "S3-5": (
        f"{_RUNS}::test_ended_run_is_not_driven_again",
        f"{_RUNS}::test_drained_run_is_queued_and_continues_where_it_stopped",
    ),
    "S3-7": (
        f"{_SPANS}::test_failed_node_and_its_segment_have_error_status",
        f"{_RUNS}::test_exhausted_run_is_a_dead_letter_with_its_cause",
    ),
    "S3-8": (
        f"{_SPANS}::test_segment_names_run_thread_step_and_checkpoint",
        f"{_SPANS}::test_nodes_and_checkpoints_belong_to_the_segment",
    ),
    "S3-9": (
        f"{_SUITE}::test_list_grows_by_some_elements_at_a_time",
        "tests/integration/test_verify.py::TestDamage::test_deleted_value",
        f"{_GROWTH}::test_twice_the_steps_store_twice_as_much",
    ),
    "S3-10": (
        f"{_RECORDS}::test_compression_keeps_values_and_what_was_stored_without_it_is_still_read",
        "tests/unit/test_codec.py::test_bomb_is_refused_before_it_takes_memory",
    ),
    "S3-11": (
        f"{_KILLS}::test_run_killed_at_any_place_ends_as_its_twin",
        f"{_PROCESSES}::test_a_run_is_submitted_driven_approved_and_finished_by_separate_processes",
        "tests/fault/test_recovery.py::test_run_goes_over_from_a_draining_process_to_a_new_one_at_once",
        f"{_DEPLOYS}::test_rolling_deploy_under_waiting_runs",
    ),
    "S3-12": (
        f"{_STORE}::test_what_is_not_there_is_not_found",
        f"{_URLS}::test_database_that_cannot_be_reached_is_named_without_its_password",
    ),
    "S3-13": (
        f"{_STEPS}::test_of_branches_those_that_were_done_before_a_crash_are_not_run_again",
        "tests/integration/test_stops.py::test_langgraphs_timeout_of_an_async_node_fails_the_attempt_and_counts",
        "tests/integration/test_stops.py::test_thread_that_is_too_slow_is_left_behind_and_its_late_result_dropped",
        f"{_STEPS}::test_save_that_takes_too_long_ends_the_step_and_the_next_one_is_not_begun",
    ),
}

_outcomes = pytest.StashKey[dict[str, set[str]]]()
_problems = pytest.StashKey[list[str]]()


def find_problems(
    requirements: Mapping[str, tuple[str, ...]], outcomes: Mapping[str, set[str]]
) -> list[str]:
    """Say which requirements were not accepted, and by which tests, from the outcomes by test."""
    by_name: dict[str, list[set[str]]] = {}
    for node_id, found in outcomes.items():
        by_name.setdefault(node_id.partition("[")[0], []).append(found)
        by_name.setdefault(node_id, []).append(found)
    problems = []
    for requirement, tests in requirements.items():
        for test in tests:
            if test not in by_name:
                problems.append(f"{requirement}: {test} is missing or was deselected")
            elif any("skipped" in found for found in by_name[test]):
                problems.append(f"{requirement}: {test} was skipped")
    return problems


def _is_full(session: pytest.Session) -> bool:
    config = session.config
    return (
        config.args_source is pytest.Config.ArgsSource.TESTPATHS
        and not config.option.collectonly
        and not any(
            config.getoption(name, None) for name in ("keyword", "markexpr", "deselect", "ignore")
        )
        and not any(config.getoption(name, None) for name in ("lf", "stepwise"))
        and not (session.shouldstop or session.shouldfail)
        # Under xdist only the process that collects all reports can judge.
        and not hasattr(config, "workerinput")
    )


class Requirements:
    """The hooks; registered by `tests/conftest.py`."""

    def __init__(self, config: pytest.Config) -> None:
        """Start with nothing seen."""
        self._config = config
        seen: dict[str, set[str]] = {}
        config.stash[_outcomes] = seen
        config.stash[_problems] = []

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Remember what became of each test."""
        self._config.stash[_outcomes].setdefault(report.nodeid, set()).add(report.outcome)

    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        """Fail a full run in which a requirement was not accepted."""
        if not _is_full(session):
            return
        seen = self._config.stash[_outcomes]
        found = find_problems(REQUIREMENTS, seen)
        self._config.stash[_problems] = found
        if found and session.exitstatus == pytest.ExitCode.OK:
            session.exitstatus = pytest.ExitCode.TESTS_FAILED

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        """Say which ones."""
        found = self._config.stash[_problems]
        if found:
            terminalreporter.section("requirements without an accepting test", red=True)
            for problem in found:
                terminalreporter.write_line(problem)
