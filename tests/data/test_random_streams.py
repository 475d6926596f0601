from data.random_streams import draw_rows


def test_the_rows_of_a_purpose_are_those_of_kept_results():
    rows = draw_rows(100, 7, "gradient distance examples")
    assert rows.tolist() == [7, 12, 57, 74, 77, 79, 91]
    assert draw_rows(100, 7, "gradient distance examples", 0).tolist() != rows.tolist()
    assert draw_rows(5, None, "gradient distance examples").tolist() == [0, 1, 2, 3, 4]
