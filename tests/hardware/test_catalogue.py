from lorafit.hardware.device import CARDS


def test_every_row_of_the_table_is_plausible():
    for card in CARDS:
        low, high = card.usd_per_hour
        assert 0 < low < high < 20, card.name
        assert 4_000 <= card.memory_mib <= 200_000, card.name
        assert (7, 0) <= card.capability <= (12, 0), card.name
        assert 10 <= card.tflops <= 2_500, card.name
        assert 150 <= card.bandwidth_gbs <= 8_000, card.name
        # a card that moved a byte in less time than it takes for 1,000 operations would be a typing error
        assert 0.03 < card.tflops / card.bandwidth_gbs < 0.5, card.name


def test_no_card_is_listed_twice():
    names = [name for card in CARDS for name in (card.name, *card.aliases)]
    assert len(names) == len(set(names))


def test_the_cards_people_have_are_there():
    names = {card.name for card in CARDS}
    assert {"T4", "L4", "A10", "A40", "RTX A6000", "L40S", "A100 40GB", "A100 80GB", "V100 16GB", "H100"} <= names
    assert {"H200", "B200", "RTX 2060", "RTX 3060", "RTX 3090", "RTX 4090", "RTX 5090", "RTX 4060 Laptop"} <= names
