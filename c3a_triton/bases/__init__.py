"""What other libraries put under an adapter: base layers, quantized ones, models on the meta device."""
