"""The tests that `make test` leaves to `make test-all`: they take long, or show again what others show.

Other slow tests have the marker themselves. Of the tests whose id begins with a key of the table, one in so many stays
in `make test`: the first, and then every n-th in the order of collection. 0 leaves none. The longest key that fits
counts.
"""

from __future__ import annotations

import pytest

SLOW = {
    # Networks, whole training runs, exporters: each takes many seconds.
    "tests/benchmarks/test_quick_run.py": 0,
    "tests/models/test_compile_networks.py": 0,
    "tests/models/test_copies_and_exports.py::test_export": 0,
    "tests/models/test_cost.py::test_the_page_holds_the_tables": 0,
    "tests/models/test_distributed.py": 0,
    "tests/models/test_export_networks.py": 0,
    "tests/models/test_families.py::test_every_family_in_every_placement": 0,
    "tests/models/test_integrations.py::test_ultralytics": 0,
    "tests/models/test_placements.py::test_yolos_have_units_where_the_stages_of_their_backbone_end": 0,
    "tests/models/test_unknown_networks.py::test_every_classifier_of_torchvision": 0,
    "tests/kernels/test_tasks.py::test_detection_and_instance_segmentation": 0,
    "tests/package/test_snippets.py::test_snippet": 3,
    "tests/package/test_train_digits.py::test_quick_run": 0,
    # Builds, and runs of pytest inside a test.
    "tests/package/test_build.py::test_cuda_library_is_built_for_the_architectures_asked_for": 0,
    "tests/package/test_build.py::test_native_build_is_for_the_gpu_that_is_there": 0,
    "tests/package/test_conftest.py::test_a_result_near_its_bound_fails_the_run": 0,
    "tests/package/test_conftest.py::test_a_run_does_not_read_code_that_an_earlier_run_compiled": 0,
    "tests/package/test_conftest.py::test_triton_is_interpreted_without_a_gpu": 0,
    # One process for each case.
    "tests/kernels/test_cache.py::test_bad_value_is_a_reason": 5,
    "tests/kernels/test_cache.py::test_variable_overrules_it": 4,
    "tests/kernels/test_working_memory.py::test_lack_of_memory_is_one_sentence_and_leaves_no_trace": 4,
    "tests/kernels/test_working_memory.py::test_two_thousand_shapes": 0,
    # Grids of the CUDA kernels, compiled for the processor under sanitizers.
    "tests/cuda/test_cuda_on_host.py::test_case": 6,
    "tests/cuda/test_cuda_on_host.py::test_finite_maps_of_any_size": 4,
    "tests/cuda/test_cuda_on_host.py::test_no_races": 4,
    "tests/cuda/test_cuda_on_host.py::test_one_bad_value": 4,
    "tests/cuda/test_cuda_on_host.py::test_random_unit": 8,
    "tests/cuda/test_cuda_on_host.py::test_sample": 8,
    # Triton's interpreter, a thousand times slower than the kernels that it runs.
    "tests/kernels/test_strides.py::test_operators[triton": 24,
    "tests/kernels/test_strides.py::test_operator_in_place[triton": 24,
    "tests/kernels/test_strides.py::test_random_calls[triton": 0,
}


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
