from lorafit.hardware.device import GPUS


def test_every_row_of_the_table_is_plausible():
    for gpu in GPUS:
        low, high = gpu.usd_per_hour
        assert 0 < low < high < 20, gpu.name
        assert 4_000 <= gpu.memory_mib <= 200_000, gpu.name
        assert (7, 0) <= gpu.capability <= (12, 0), gpu.name
        assert 10 <= gpu.tflops <= 2_500, gpu.name
        assert 150 <= gpu.bandwidth_gbs <= 8_000, gpu.name
        # a GPU that moved a byte in less time than it takes for 1,000 operations would be a typing error
        assert 0.03 < gpu.tflops / gpu.bandwidth_gbs < 0.5, gpu.name


def test_no_gpu_is_listed_twice():
    names = [name for gpu in GPUS for name in (gpu.name, *gpu.aliases)]
    assert len(names) == len(set(names))


def test_the_gpus_people_have_are_there():
    names = {gpu.name for gpu in GPUS}
    assert {"T4", "L4", "A10", "A40", "RTX A6000", "L40S", "A100 40GB", "A100 80GB", "V100 16GB", "H100"} <= names
    assert {"H200", "B200", "RTX 2060", "RTX 3060", "RTX 3090", "RTX 4090", "RTX 5090", "RTX 4060 Laptop"} <= names
