"""The parts that methods are built from: memories, distillation, importance, generators, masks and gates."""
