"""The tests that `make test` leaves to `make test-all`: they take long, or show again what others show.

Other slow tests have the marker themselves. Of the tests whose id begins with a key of the table, one in so many stays
in `make test`: the first, and then every n-th in the order of collection. 0 leaves none. The longest key that fits
counts.
"""

from __future__ import annotations

import re
from collections import defaultdict
from typing import Any

import pytest

#: An environment variable. "5/4" runs one in four of the slow cases of each test with parameters, those of turn 5, so
#: that four turns run all. CI takes the number of commits as the turn.
TURN = "STEAM_KERNELS_TEST_TURN"

SLOW = {
    # Networks, whole training runs, exporters: each takes many seconds.
    "tests/benchmarks/test_contenders.py::test_the_honest_baseline_is_the_unit": 0,
    "tests/benchmarks/test_gpu_host.py::test_measured_without_a_gpu": 0,
    "tests/benchmarks/test_gpu_report.py::test_without_a_gpu_one_sentence": 2,
    "tests/benchmarks/test_measurement.py::test_a_spoilt_measurement_is_made_once": 0,
    "tests/benchmarks/test_measurement.py::test_without_kernels_nothing_is_called_fused": 0,
    "tests/benchmarks/test_networks.py::test_a_wrong_network_has_no_price": 0,
    "tests/benchmarks/test_networks.py::test_compiled_contenders_are_not_each_others": 0,
    "tests/benchmarks/test_progress.py::test_a_selection_of_nothing_names_the_shapes": 0,
    "tests/benchmarks/test_progress.py::test_each_part_counts_its_rows": 0,
    "tests/benchmarks/test_progress.py::test_the_closing_table_replaces_that_of_pytest_benchmark": 0,
    "tests/benchmarks/test_progress.py::test_the_output_fits_a_terminal": 0,
    "tests/benchmarks/test_quick_run.py": 0,
    "tests/evaluation/test_classification.py::test_a_lost_run_goes_on_to_the_same_bits": 7,
    "tests/evaluation/test_classification.py::test_a_run_goes_on_from_the_checkpoint_of_its_last_epoch": 0,
    "tests/evaluation/test_classification.py::test_gflops_are_those_of_the_page": 0,
    "tests/evaluation/test_classification.py::test_loading_processes_change_no_bit": 0,
    "tests/evaluation/test_classification.py::test_the_script": 0,
    "tests/evaluation/test_datasets.py::test_boxes_and_masks_are_exact": 0,
    "tests/evaluation/test_datasets.py::test_the_photographs_of_the_package": 0,
    "tests/evaluation/test_detection.py::test_a_lost_run_goes_on_to_the_same_bits_and_is_reported": 0,
    "tests/evaluation/test_detection.py::test_other_detectors": 0,
    "tests/kernels/test_tasks.py::test_classification": 0,
    "tests/kernels/test_tasks.py::test_detection_and_instance_segmentation": 0,
    "tests/models/test_compile_networks.py": 0,
    "tests/models/test_copies_and_exports.py::test_compile": 0,
    "tests/models/test_copies_and_exports.py::test_export": 0,
    "tests/models/test_cost.py::test_the_page_holds_the_tables": 0,
    "tests/models/test_distributed.py": 0,
    "tests/models/test_export_networks.py": 0,
    "tests/models/test_families.py::test_blocks_act_before_the_addition": 3,
    "tests/models/test_families.py::test_documented_counts": 0,
    "tests/models/test_families.py::test_every_family_in_every_placement": 0,
    "tests/models/test_hosts.py::test_compiled_code_is_not_that_of_another_network": 2,
    "tests/models/test_integrations.py::test_ultralytics": 0,
    "tests/models/test_models.py::test_ready_models": 3,
    "tests/models/test_placements.py::test_a_detectors_units_are_in_its_backbone": 3,
    "tests/models/test_placements.py::test_a_yolo_with_units_by_name_trains_and_fuses": 0,
    "tests/models/test_placements.py::test_yolos_have_units_where_the_stages_of_their_backbone_end": 0,
    "tests/models/test_training_tools.py::test_grad_scaler_skips_a_step_that_overflows": 2,
    "tests/models/test_training_tools.py::test_placements_by_name_leave_convolutions_alone": 0,
    "tests/models/test_training_tools.py::test_vmap_per_sample_gradients_and_ensemble": 2,
    "tests/models/test_unknown_networks.py::test_every_classifier_of_torchvision": 0,
    "tests/models/test_unknown_networks.py::test_stages_of_a_network_that_is_not_known": 16,
    "tests/package/test_snippets.py::test_snippet": 6,
    "tests/package/test_train_digits.py::test_fused_and_reference_train_alike": 0,
    "tests/package/test_train_digits.py::test_quick_run": 0,
    # Compilers and exporters.
    "tests/unit/test_compile.py::test_compiled_gradients_at_changing_sizes": 4,
    "tests/unit/test_compile.py::test_in_place_compiled": 3,
    "tests/unit/test_compile.py::test_module_in_a_network": 0,
    "tests/unit/test_compile.py::test_training_step_of_a_network": 0,
    "tests/unit/test_compile_layout.py::test_no_copies_at_inference": 0,
    "tests/unit/test_compile_layout.py::test_no_copies_in_training": 0,
    "tests/unit/test_compile_layout.py::test_tail_of_two_memory_formats": 0,
    "tests/unit/test_contexts.py::test_functorch_grad_compiled": 0,
    "tests/unit/test_export.py::test_decompositions": 0,
    "tests/unit/test_export.py::test_dynamic_sizes": 0,
    "tests/unit/test_export.py::test_network": 0,
    "tests/unit/test_export.py::test_other_dtypes": 3,
    "tests/unit/test_onnx.py::test_dtypes": 4,
    "tests/unit/test_onnx.py::test_dynamic_channels": 8,
    "tests/unit/test_onnx.py::test_dynamic_sizes": 5,
    "tests/unit/test_onnx.py::test_dynamic_sizes_from_a_small_example": 8,
    "tests/unit/test_onnx.py::test_opsets": 5,
    "tests/unit/test_onnx.py::test_static_sizes": 8,
    "tests/unit/test_scale.py::test_export_takes_the_buffer": 4,
    # Builds, and runs of pytest inside a test.
    "tests/cuda/test_cuda_compile.py::test_built_kernels_do_not_spill": 0,
    "tests/cuda/test_cuda_compile.py::test_no_figure_is_worse_than_recorded": 0,
    "tests/package/test_build.py::test_cuda_library_is_built_for_the_architectures_asked_for": 0,
    "tests/package/test_build.py::test_cuda_off_builds_none_and_removes_an_older_one": 0,
    "tests/package/test_build.py::test_native_build_is_for_the_gpu_that_is_there": 0,
    "tests/package/test_build.py::test_nothing_is_compiled_twice_on_the_way_to_the_library_for_all_processors": 0,
    "tests/package/test_build.py::test_require_does_not_demand_cuda_of_a_torch_without_it": 0,
    "tests/package/test_conftest.py::test_a_result_near_its_bound_fails_the_run": 0,
    "tests/package/test_conftest.py::test_a_run_does_not_read_code_that_an_earlier_run_compiled": 0,
    "tests/package/test_conftest.py::test_one_worker_runs_the_tests_of_a_group": 0,
    "tests/package/test_conftest.py::test_triton_is_interpreted_without_a_gpu": 0,
    "tests/package/test_cross_build.py::test_a_cross_build_has_a_folder_of_its_own": 0,
    "tests/package/test_cross_build.py::test_another_named_torch_is_built_against_anew": 0,
    # One process for each case.
    "tests/kernels/test_cache.py::test_bad_value_is_a_reason": 10,
    "tests/kernels/test_cache.py::test_variable_overrules_it": 4,
    "tests/kernels/test_working_memory.py::test_lack_of_memory_is_one_sentence_and_leaves_no_trace": 8,
    "tests/kernels/test_working_memory.py::test_two_thousand_shapes": 0,
    "tests/unit/test_backends.py::test_a_variable_that_stops_the_kernels_is_warned_of": 2,
    "tests/unit/test_backends.py::test_an_older_torch_is_an_import_error": 3,
    "tests/unit/test_backends.py::test_forced_cpu_variant": 3,
    "tests/unit/test_backends.py::test_no_warning_where_the_reference_was_asked_for_or_kernels_run": 0,
    "tests/unit/test_backends.py::test_the_reference_does_not_run_in_silence": 2,
    "tests/unit/test_backends.py::test_unknown_cpu_variant_is_a_reason": 3,
    "tests/unit/test_backends.py::test_variants_agree": 0,
    "tests/unit/test_backends.py::test_without_torchvision_and_plotting": 0,
    # Grids of second derivatives and of bounds.
    "tests/unit/test_gradients.py::test_gradcheck": 6,
    "tests/unit/test_tolerances.py::test_bounds_do_not_depend_on_the_machine": 0,
    "tests/unit/test_tolerances.py::test_planted_errors_are_caught_in_the_median_case": 0,
    "tests/unit/test_tolerances.py::test_two_eps_of_a_rounded_result_are_caught": 0,
    # Grids of the CPU kernels, which CI repeats for each variant of the processor.
    "tests/kernels/test_bounds.py::test_nothing_is_read_or_written_out_of_bounds": 2,
    "tests/kernels/test_cache.py::test_no_bit_depends_on_it": 4,
    "tests/kernels/test_kernels.py::test_large": 3,
    "tests/kernels/test_kernels.py::test_outputs_larger_than_the_cache": 4,
    "tests/kernels/test_kernels.py::test_sample": 3,
    "tests/kernels/test_layouts.py::test_all_layouts_of_all_arguments": 4,
    "tests/kernels/test_layouts.py::test_strides_of_outputs": 4,
    "tests/kernels/test_nonfinite.py::test_finite_maps": 6,
    "tests/kernels/test_nonfinite.py::test_the_closed_form_is_as_good": 3,
    "tests/kernels/test_numerics.py::test_far_from_zero": 4,
    "tests/kernels/test_numerics.py::test_saturated_gates": 4,
    "tests/kernels/test_random_units.py::test_random_unit": 3,
    "tests/kernels/test_strides.py::test_one_column_and_no_samples": 2,
    "tests/kernels/test_strides.py::test_operator_in_place": 4,
    "tests/kernels/test_strides.py::test_operators": 8,
    "tests/kernels/test_strides.py::test_random_calls": 2,
    "tests/kernels/test_strides.py::test_steam": 4,
    # Grids of the CUDA kernels, compiled for the processor under sanitizers.
    "tests/cuda/test_cuda_on_host.py::test_case": 24,
    "tests/cuda/test_cuda_on_host.py::test_finite_maps_of_any_size": 8,
    "tests/cuda/test_cuda_on_host.py::test_no_races": 0,
    "tests/cuda/test_cuda_on_host.py::test_one_bad_value": 4,
    "tests/cuda/test_cuda_on_host.py::test_planted_mistake_is_caught": 4,
    "tests/cuda/test_cuda_on_host.py::test_random_unit": 8,
    "tests/cuda/test_cuda_on_host.py::test_sample": 0,
    # Triton's interpreter, a thousand times slower than the kernels that it runs.
    "tests/kernels/test_strides.py::test_operator_in_place[triton": 24,
    "tests/kernels/test_strides.py::test_operators[triton": 24,
    "tests/kernels/test_strides.py::test_random_calls[triton": 0,
    "tests/triton/test_choice.py::test_the_gpu_key_runs_the_first_backend_that_can": 3,
    "tests/triton/test_launch.py::test_tuner_candidates_compute_the_same": 0,
    "tests/triton/test_nonfinite.py": 8,
    "tests/triton/test_nonfinite.py::test_one_bad_value": 0,
    "tests/triton/test_operators.py::test_in_place": 3,
    "tests/triton/test_operators.py::test_opcheck": 0,
    "tests/triton/test_operators.py::test_strides_of_axes_of_length_1_mean_nothing": 6,
    "tests/triton/test_operators.py::test_twice_differentiable": 0,
    "tests/triton/test_operators.py::test_weights_of_any_strides": 2,
    "tests/triton/test_operators.py::test_what_is_not_asked_for": 10,
    "tests/triton/test_results.py::test_a_sample_does_not_depend_on_its_batch": 2,
    "tests/triton/test_results.py::test_maps": 20,
    "tests/triton/test_results.py::test_other_levels": 10,
    "tests/triton/test_results.py::test_pairs": 24,
    "tests/triton/test_results.py::test_random_unit_against_the_oracle": 7,
    "tests/triton/test_results.py::test_runs_in_the_number_of_launches_promised": 2,
    "tests/triton/test_results.py::test_same_bits_again": 2,
    "tests/triton/test_source.py::test_barriers_order_global_memory": 0,
}


def parameters(request: pytest.FixtureRequest, name: str) -> list[Any]:
    """The values of a parameter in those tests of the fixture's module that run. A fixture makes what these need."""
    items = [item for item in request.session.items if item.path == request.path and hasattr(item, "callspec")]
    return list(dict.fromkeys(item.callspec.params[name] for item in items if name in item.callspec.params))


def mark(items: list[pytest.Item]) -> None:
    """Gives the tests of the table the marker `slow`, but for those that stay."""
    seen = dict.fromkeys(SLOW, 0)
    for item in items:
        keys = [key for key in SLOW if item.nodeid.startswith(key)]
        if not keys:
            continue
        key = max(keys, key=len)
        if SLOW[key] == 0 or seen[key] % SLOW[key]:
            item.add_marker(pytest.mark.slow)
        seen[key] += 1


def of_turn(items: list[pytest.Item], turn: str) -> tuple[list[pytest.Item], list[pytest.Item]]:
    """The tests that run in a turn, and the others. Each test with parameters has a case in every turn."""
    found = re.fullmatch(r"(\d+)/([1-9]\d*)", turn)
    if found is None:
        raise pytest.UsageError(f"{TURN} is {turn!r}; allowed are a number and a number from 1, as in 5/4")
    now, turns = map(int, found.groups())
    grids = defaultdict(list)
    for item in items:
        name, parameters, _ = item.nodeid.partition("[")
        if parameters and item.get_closest_marker("slow"):
            grids[name].append(item)
    others = {
        item.nodeid for grid in grids.values() for i, item in enumerate(grid) if (i - now) % min(turns, len(grid))
    }
    return [i for i in items if i.nodeid not in others], [i for i in items if i.nodeid in others]
