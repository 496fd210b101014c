export const dynamic = 'force-dynamic';
export { default as GET, default as POST } from '../../fetch.js';
