"""``--precision auto``: measures the candidates and decides; it never exports."""
