"""The Lowbit service; its folders stand in call order and import only downwards."""
