"""Operations on arrays that XLA:CPU runs quickly: products, writes in place, rotary positions."""
