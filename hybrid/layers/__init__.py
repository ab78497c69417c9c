"""The parts of a DeepSeek-V3-shaped decoder layer, written against `DeviceOps`: what the GPU side can do."""
