<?php
// The app for PHP's own server and for php-fpm.
switch (parse_url($_SERVER['REQUEST_URI'], PHP_URL_PATH)) {
    case '/':
        echo "hello\n";
        break;
    case '/slow':
        usleep($_GET['ms'] * 1000);
        echo "done\n";
        break;
    case '/stream':
        for ($i = 1; $i <= $_GET['n']; $i++) {
            echo "line $i of {$_GET['n']}\n";
            flush();
            usleep($_GET['ms'] * 1000);
        }
        break;
    case '/upload':
        echo json_encode(['bytes' => strlen(file_get_contents('php://input')), 'by' => 'php']);
        break;
    default:
        http_response_code(404);
}
