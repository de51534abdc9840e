// What compiled code calls for the operation `ddpm::winograd`: torch's C interface.
static inline AOTITorchError aoti_torch_cpu_winograd(
    AtenTensorHandle x, AtenTensorHandle u, AtenTensorHandle bias, int64_t doubled,
    AtenTensorHandle* made) {
    const int64_t* of_x = nullptr;
    const int64_t* of_u = nullptr;
    AOTI_TORCH_ERROR_CODE_CHECK(aoti_torch_get_sizes(x, const_cast<int64_t**>(&of_x)));
    AOTI_TORCH_ERROR_CODE_CHECK(aoti_torch_get_sizes(u, const_cast<int64_t**>(&of_u)));
    const int64_t N = of_x[0], C = of_x[1], H = of_x[2] << doubled, W = of_x[3] << doubled;
    const int64_t K = of_u[2], sizes[] = {N, K, H, W}, strides[] = {H * W * K, 1, W * K, K};
    AOTI_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(
        4, sizes, strides, aoti_torch_dtype_float32(), aoti_torch_device_type_cpu(), 0, made));
    void *at_x, *at_u, *at_bias, *at_y;
    AOTI_TORCH_ERROR_CODE_CHECK(aoti_torch_get_data_ptr(x, &at_x));
    AOTI_TORCH_ERROR_CODE_CHECK(aoti_torch_get_data_ptr(u, &at_u));
    AOTI_TORCH_ERROR_CODE_CHECK(aoti_torch_get_data_ptr(bias, &at_bias));
    AOTI_TORCH_ERROR_CODE_CHECK(aoti_torch_get_data_ptr(*made, &at_y));
    ddpm_winograd::convolve(
        static_cast<const float*>(at_x), static_cast<const float*>(at_u),
        static_cast<const float*>(at_bias), static_cast<float*>(at_y),
        {size_t(N), size_t(H), size_t(W), size_t(C), size_t(K), int(doubled)});
    return AOTI_TORCH_SUCCESS;
}
